"""FID and CLIP score of a small folder of images, offline.

Small networks stand in for Inception and CLIP.
"""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import lpips
import numpy as np
import pytest
import torch
from PIL import Image
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor

import checkpoint
import evaluate
from command import TINY_TEACHER, BadInput
from evaluation import real_images
from evaluation.perceptual import perceptual_distance
from formats import images

CAPTIONS = [f"picture {k} of a cat" for k in range(6)]


class Mean(torch.nn.Module):
    """Three features of an image: the mean of each channel."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return images.float().mean((2, 3))


@pytest.fixture(scope="module")
def networks(tmp_path_factory):
    """A TorchScript feature network and a CLIP folder, both tiny."""
    folder = tmp_path_factory.mktemp("networks")
    torch.jit.script(Mean()).save(folder / "mean.pt")
    tokenizer = checkpoint.load(TINY_TEACHER).tokenizer
    size = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1,
            "num_attention_heads": 2}
    text = size | {"vocab_size": len(tokenizer), "max_position_embeddings": 77,
                   "eos_token_id": tokenizer.eos_token_id}
    torch.manual_seed(0)
    vision = size | {"image_size": 32, "patch_size": 16}
    CLIPModel(
        CLIPConfig(text_config=text, vision_config=vision, projection_dim=8)
    ).save_pretrained(folder / "clip")
    square = {"height": 32, "width": 32}
    CLIPProcessor(
        CLIPImageProcessor(size=square, crop_size=square), tokenizer
    ).save_pretrained(folder / "clip")
    return folder


@pytest.fixture
def coco_folder(tmp_path):
    """COCO's layout: 6 images with two captions each."""
    folder = tmp_path / "coco"
    (folder / "annotations").mkdir(parents=True)
    (folder / "val2017").mkdir()
    rng, annotations = np.random.default_rng(0), []
    for k, caption in enumerate(CAPTIONS):
        Image.fromarray(
            rng.integers(0, 256, (40, 50 + k, 3), dtype=np.uint8)
        ).save(folder / "val2017" / f"{k:012d}.jpg")
        annotations += [{"image_id": 70 + k, "id": 2 * k, "caption": f" {caption}\n"},
                        {"image_id": 70 + k, "id": 2 * k + 1, "caption": "another"}]
    content = json.dumps({"annotations": annotations[::-1]})
    (folder / "annotations" / "captions_val2017.json").write_text(content)
    return folder


def arguments(networks, *more):
    return ["--model", TINY_TEACHER, "--steps", "2", "--feature-extractor", networks / "mean.pt",
            "--clip", networks / "clip", "--image-size", 32, *more]


def test_fid_and_clip_score_of_a_coco_folder(call, networks, coco_folder):
    code, out, err = call(
        evaluate.main, *arguments(networks, "--coco", coco_folder, "--steps", "2,1")
    )
    assert code == 0, err
    rows = json.loads(Path("runs/evaluate.json").read_text())
    assert [(row["model"], row["steps"], row["samples"]) for row in rows] == [
        ("tiny_sd.safetensors", k, 6) for k in (2, 1)
    ]
    assert all(row["fid"] > 0 and -1 <= row["clip_score"] <= 1 and row["caption_accuracy"] is None
               for row in rows)
    assert rows[0]["relative_straightness"] > 0
    folder = Path("runs/evaluate-images/tiny_sd-2-2.5")
    paths = sorted(folder.glob("*.png"))
    assert len(paths) == 6 and Path("runs/evaluate.png").exists()

    # A missing image is generated again, to the byte, and no other image.
    before = {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in paths}
    paths[3].unlink()
    code, out, err = call(
        evaluate.main, *arguments(networks, "--coco", coco_folder, "--steps", "2,1")
    )
    assert code == 0, err
    for path in paths:
        assert path.read_bytes() == before[path][0]
        assert (path.stat().st_mtime_ns == before[path][1]) == (path != paths[3])
    resumed_rows = json.loads(Path("runs/evaluate.json").read_text())
    assert [row["fid"] for row in resumed_rows] == [row["fid"] for row in rows]

    # The FID of a set with itself is 0.
    Path("captions.txt").write_text("\n".join(CAPTIONS))
    shutil.copytree(folder, "same", ignore=shutil.ignore_patterns("*.json"))
    code, out, err = call(
        evaluate.main, *arguments(networks, "--images", "same", "--prompts", "captions.txt")
    )
    assert code == 0, err
    assert json.loads(Path("runs/evaluate.json").read_text())[0]["fid"] == pytest.approx(
        0, abs=1e-3
    )


def test_captions_of_coco_2017_and_2014(coco_folder):
    captions, images, side = real_images.read_coco(coco_folder, None)
    assert (captions, side) == (CAPTIONS, 512) and [
        path.name[-5] for path in images
    ] == list("012345")
    assert real_images.read_coco(coco_folder, 2)[0] == CAPTIONS[:2]
    (coco_folder / "val2017").rename(coco_folder / "val2014")
    annotations = coco_folder / "annotations"
    (annotations / "captions_val2017.json").rename(annotations / "captions_val2014.json")
    captions, _, side = real_images.read_coco(coco_folder, None)
    shutil.copy(annotations / "captions_val2014.json", annotations / "captions_val2017.json")
    assert real_images.read_coco(coco_folder, None)[2] == 256  # the split whose images are there
    assert side == 256 and sorted(captions) == sorted(CAPTIONS + ["another"] * 6)
    assert real_images.read_coco(coco_folder, None)[0] == captions  # the same selection every time


def test_fid_of_known_gaussians(networks, tmp_path):
    """Each image has one colour, which is its feature. Equal covariances: FID = ‖m1 - m2‖²."""
    fid = real_images.feature_distance(str(networks / "mean.pt"), torch.device("cpu"))
    colours = torch.from_numpy(np.random.default_rng(0).integers(20, 200, (400, 3), dtype=np.uint8))
    as_images = lambda c: c[:, :, None, None].expand(-1, -1, 4, 4).contiguous()
    fid.update(as_images(colours), real=True)
    fid.update(as_images(colours + torch.tensor([3, 0, 4], dtype=torch.uint8)), real=False)
    assert fid.compute().item() == pytest.approx(25, rel=1e-4)


def test_images_are_cropped_to_their_middle_square(tmp_path):
    pixels = np.zeros((10, 30, 3), dtype=np.uint8)
    pixels[:, 10:20] = 200  # the middle square
    Image.fromarray(pixels).save(tmp_path / "a.png")
    assert (images.read_image(tmp_path / "a.png", 10, 10) == 200).all()
    (tmp_path / "b.png").write_text("no image")
    with pytest.raises(BadInput, match="b.png: not a readable image"):
        images.read_image(tmp_path / "b.png", 10, 10)


def test_bad_input_is_a_one_line_error(call, networks, coco_folder, tmp_path):
    def error_of(*more):
        code, _, err = call(evaluate.main, *arguments(networks, *more))
        assert code == 2 and err.count("\n") == 0
        return err

    assert "needs --prompts" in error_of("--images", coco_folder / "val2017")
    assert "give one of them" in error_of(
        "--images", coco_folder / "val2017", "--coco", coco_folder
    )
    assert "COCO's folder" in error_of("--coco", tmp_path)
    assert "--repeats" in error_of("--coco", coco_folder, "--repeats", 2)
    assert "--feature-extractor" in error_of(
        "--coco", coco_folder, "--feature-extractor", TINY_TEACHER
    )
    assert "--clip" in error_of("--coco", coco_folder, "--clip", tmp_path / "none")
    (coco_folder / "annotations" / "captions_val2017.json").write_text("{}")
    assert "not a COCO caption file" in error_of("--coco", coco_folder)


def test_failed_download_of_a_network_is_named(call, networks, coco_folder, monkeypatch):
    import torchmetrics.image.fid

    def offline(*args, **kwargs):
        raise OSError("no route to host")

    monkeypatch.setattr(torchmetrics.image.fid, "FrechetInceptionDistance", offline)
    code, _, err = call(evaluate.main, "--model", TINY_TEACHER, "--coco", coco_folder,
                        "--clip", networks / "clip")
    assert code == 2 and "could not be downloaded (no route to host)" in err


def test_models_of_one_name_are_refused_and_versions_have_their_own_folders(
        call, networks, coco_folder, tmp_path):
    for folder in "ab":
        (tmp_path / folder).mkdir()
        shutil.copy(TINY_TEACHER, tmp_path / folder / "m.safetensors")
    two = ["--model", tmp_path / "a/m.safetensors", tmp_path / "b/m.safetensors", "--steps", 1]
    code, _, err = call(evaluate.main, *two)
    assert code == 2 and "two are named m.safetensors" in err and "\n" not in err
    model = checkpoint.load(TINY_TEACHER)
    fid = real_images.feature_distance(str(networks / "mean.pt"), torch.device("cpu"))
    gallery = real_images.Gallery(CAPTIONS[:1], [], 32, tmp_path / "images", fid, None)
    folders = [gallery.generate(replace(model, path=f"v1.{k}"), "", 1, 1.0, range(1))
               for k in (4, 5)]
    assert folders[0] != folders[1]


def out_of_memory(*arguments, **more):
    raise torch.OutOfMemoryError("CUDA out of memory")


def test_out_of_memory_is_no_wrong_flag(networks, coco_folder):
    fid = SimpleNamespace(update=out_of_memory, device="cpu")
    (coco_folder / "val2017" / "._000000000001.jpg").touch()  # of a Mac's copy
    images = real_images.read_images(coco_folder / "val2017")
    assert len(images) == len(CAPTIONS)
    with pytest.raises(torch.OutOfMemoryError):
        real_images.Gallery(CAPTIONS, images, 32, Path("images"), fid, None).measure_real()


def test_fid_is_not_summed_over_processes(networks):
    """All processes measure all images."""
    fid = real_images.feature_distance(str(networks / "mean.pt"), torch.device("cpu"))
    assert not fid.sync_on_compute


def test_a_damaged_backbone_is_one_line(call, monkeypatch, tmp_path):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(torch.hub, "_hub_dir", None)
    (tmp_path / "hub/checkpoints").mkdir(parents=True)
    (tmp_path / "hub/checkpoints/alexnet-owt-7be5be79.pth").write_bytes(b"x")
    with pytest.raises(BadInput, match="--lpips-net alex: its backbone could not be"):
        perceptual_distance("alex", torch.device("cpu"))

    monkeypatch.setattr(lpips, "LPIPS", out_of_memory)
    with pytest.raises(torch.OutOfMemoryError):
        perceptual_distance("alex", torch.device("cpu"))


def test_a_damaged_clip_is_one_line(networks, tmp_path):
    shutil.copytree(networks / "clip", tmp_path / "clip")
    weights = tmp_path / "clip" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    with pytest.raises(BadInput, match="--clip .*: could not be read"):
        real_images.caption_score(str(tmp_path / "clip"), torch.device("cpu"))
