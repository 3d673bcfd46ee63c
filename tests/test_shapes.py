"""The shapes dataset, its judge, and the committed tiny model."""

import json
import random

import pytest
import torch
from PIL import Image

import checkpoint
from conftest import ROOT
from evaluation.figures import frechet_distance
from sample import sample_images
from stable_diffusion import FAMILIES
from toy import attention, picture, shapes, train_teacher
from toy.shapes import Caption, Phrase, Scene, obeys, parse

FIGURES = json.loads((ROOT / "toy" / "tiny_sd.json").read_text())


@pytest.fixture(scope="module")
def classifier():
    return shapes.load_reader()


@pytest.fixture(scope="module")
def model():
    return checkpoint.load(ROOT / "toy" / "tiny_sd.safetensors")


def is_full(caption):
    return caption.relation in shapes.RELATIONS and not caption.omitted


def test_captions_parse_and_their_scenes_obey_them():
    for caption in (
        shapes.random_captions(2000, 1) + shapes.full_captions(200, 1)
        + shapes.open_captions(200, 1)
    ):
        assert parse(str(caption)) == caption
        assert obeys(shapes.scene_of(caption, random.Random(1)), caption)
    assert all(is_full(caption) for caption in shapes.full_captions(100, 2))
    assert not any(is_full(caption) for caption in shapes.open_captions(100, 2))
    assert all(caption.second is None for caption in shapes.single_captions(100, 2))
    for text in ("a pink circle", "circle", "a red", ""):
        with pytest.raises(ValueError):
            parse(text)


@pytest.mark.parametrize(
    "make",
    [shapes.random_captions, shapes.open_captions, shapes.full_captions, shapes.single_captions],
)
def test_a_fifth_of_the_captions_is_for_evaluation(make):
    training, evaluation = (
        shapes.training_captions(500, 3, make), shapes.measuring_captions(500, 3, make)
    )
    assert len(training) == len(evaluation) == 500 and not set(training) & set(evaluation)
    assert training[:100] == shapes.training_captions(100, 3, make)
    captions = make(4000, 5)
    assert sum(map(shapes.is_for_measuring, captions)) / 4000 == pytest.approx(0.2, abs=0.09)


def test_scene_obeys_true_captions_and_no_false_ones():
    red, blue = Phrase("red", "circle"), Phrase("blue", "square")
    scene = Scene("vertical", (("red", "circle"), ("blue", "square")))
    true = [Caption(red, "above", blue), Caption(blue, "below", red), Caption(blue, "and", red),
            Caption(red, "and", blue),
            Caption(Phrase(None, "circle"), "above", Phrase("blue", None))]
    false = [Caption(red, "below", blue), Caption(blue, "above", red),
             Caption(red, "left of", blue), Caption(red),
             Caption(Phrase("red", "square"), "and", Phrase("blue", "circle"))]
    assert all(obeys(scene, caption) for caption in true)
    assert not any(obeys(scene, caption) for caption in false)


def test_images_show_their_scene():
    scene = Scene("horizontal", (("red", "square"), ("blue", "circle")))
    images = shapes.draw([scene] * 4, seed=3)
    assert images.shape == (4, 3, 32, 32) and images.min() >= -1 and images.max() <= 1
    assert torch.equal(images, shapes.draw([scene] * 4, seed=3))
    assert not torch.equal(images[0], images[1])
    red, _, blue = images[0]
    columns = torch.arange(32.0)
    bright = lambda channel: (channel - shapes.GRAY).clamp(min=0)
    centre = lambda channel: (bright(channel).sum(0) * columns).sum() / bright(channel).sum()
    assert centre(red) < centre(blue)


def test_classifier_reads_real_images(classifier):
    captions = shapes.random_captions(4000, 99)
    features = shapes.real_features(classifier, captions, 98)
    assert sum(shapes.right(classifier, features, captions)) / 4000 >= 0.995
    wrong_captions = captions[1:] + captions[:1]
    assert sum(shapes.right(classifier, features, wrong_captions)) / 4000 < 0.3


def test_committed_model_is_small_and_has_the_training_captions(model):
    path = ROOT / "toy" / "tiny_sd.safetensors"
    assert path.stat().st_size <= 15e6
    assert model.kind == "diffusion" and model.family == "shapes"
    prompts = FAMILIES["shapes"].captions.read_text().splitlines()
    assert prompts == [
        str(caption)
        for caption in shapes.training_captions(train_teacher.CAPTIONS, FIGURES["seed"])
    ]
    longest = max(len(ids) for ids in model.tokenizer(prompts)["input_ids"])
    assert longest <= model.text_encoder.config.max_position_embeddings


def test_each_word_of_the_captions_is_one_token(model):
    text = "a red circle left of a white shape"
    assert len(model.tokenizer(text)["input_ids"]) == len(text.split()) + 2
    assert len(model.tokenizer("Ünïcode")["input_ids"]) > 3


def test_committed_model_reaches_its_committed_accuracy(model, classifier):
    captions = shapes.full_captions(200, 7)
    # 8 steps are as good as the 25 of the committed figure.
    images = sample_images(model, [str(c) for c in captions], range(200), 8, FIGURES["guidance"])
    with torch.no_grad():
        accuracy = sum(shapes.right(classifier, classifier.features(images), captions)) / 200
    # The standard error of a fraction of 200 images.
    standard_error = (max(accuracy * (1 - accuracy), 0.02) / 200) ** 0.5
    assert abs(accuracy - FIGURES["full"]["teacher"]) < 3 * standard_error


def test_teacher_training_runs_and_a_second_run_changes_nothing(tmp_path, call):
    """Every stage from scratch, for three iterations. A second run finds them all done."""
    few = [f"--{stage}-iterations=3" for stage in ("reader", "autoencoder", "text", "unet")]
    (tmp_path / "captions.txt").write_text("the user's own")
    arguments = [*few, "--data", "64", "--out", tmp_path / "t.safetensors",
                 "--work", tmp_path / "work"]
    train_teacher.MEASURED, measured = 8, train_teacher.MEASURED
    try:
        assert call(train_teacher.main, *arguments)[0] == 0
        first = (tmp_path / "t.safetensors").read_bytes()
        assert call(train_teacher.main, *arguments)[0] == 0
    finally:
        train_teacher.MEASURED = measured
    assert (tmp_path / "t.safetensors").read_bytes() == first
    assert {path.name for path in tmp_path.iterdir()} == {
        "captions.txt", "work", "t.safetensors", "t.json", "t-captions.txt", "t-reader.safetensors"}
    assert (tmp_path / "captions.txt").read_text() == "the user's own"
    teacher = checkpoint.load(tmp_path / "t.safetensors")
    assert teacher.encode_prompts(["a red circle"]).shape == (1, 16, 128)


def test_frechet_distance_of_known_gaussians():
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(200_000, 3, generator=generator, dtype=torch.float64)
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-9)
    assert frechet_distance(a, a + 2) == pytest.approx(12, rel=1e-6)
    scale = torch.tensor([1.0, 2.0, 0.5], dtype=torch.float64)
    # Diagonal covariances: the sum of the squared differences of the standard deviations.
    b = torch.randn(200_000, 3, generator=generator, dtype=torch.float64) * scale
    assert frechet_distance(a, b) == pytest.approx(1.0 + 0.25, rel=0.02)


def test_readme_image_needs_two_models_of_one_dataset(call):
    code, out, err = call(
        picture.main, "--flow", ROOT / "toy/tiny_sd.safetensors", "--one-step",
        ROOT / "toy/tiny_instaflow.safetensors", "--prompts", "a red circle", "a blue square",
        "--out", "image.png")
    assert code == 0 and "2 captions, four rows" in out, err
    assert len(Image.open("image.png").convert("RGB").getcolors(10**7)) > 20
    for main in (attention.main, picture.main):
        for out in ("a.txt", "runs/a"):
            code, _, err = call(main, "--out", out)
            assert code == 2 and f"--out {out}: must end in .png" in err
    code, _, err = call(picture.main, "--flow", ROOT / "toy/tiny_emoji.safetensors",
                        "--one-step", ROOT / "toy/tiny_instaflow.safetensors")
    assert code == 2 and "was trained on another dataset than" in err
