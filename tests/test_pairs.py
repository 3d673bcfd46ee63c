"""Pairs: what a seed gives, which shards are reused, what is refused; and prompt files."""

import json

import pytest
import torch

import checkpoint
import command
import pairs
from command import BadInput
from diffusion import NoiseSchedule, dpm_solver
from formats.prompts import read_prompts
from make_checkpoint import make_model, write_single_file
from pairs import built_in_prompts, make_pair_spec, make_pairs
from rectified_flow import guided
from sample import noise_from_seeds, seed_range

PROMPTS = ["a cat", "a dog", "a bird"]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    path = tmp_path_factory.mktemp("model") / "a.safetensors"
    checkpoint.save(make_model(), path)
    return checkpoint.load(path)


@pytest.fixture(autouse=True)
def small_shards(monkeypatch):
    monkeypatch.setattr(pairs, "PAIRS_PER_SHARD", 4)


def make(model, folder, count=10, **changes):
    """make_pairs with small settings; changes: other settings, batch_size or repair."""
    settings = dict(prompts=PROMPTS, source="test", steps=2, guidance=2.0, solver="dpm",
                    purpose="reflow", seed=5, batch_size=3) | changes
    options = {name: settings.pop(name) for name in ("batch_size", "repair") if name in settings}
    return make_pairs(model, settings["prompts"], make_pair_spec(model, count=count, **settings),
                      folder, **options)


def test_pairs_are_the_teachers_samples(model, tmp_path):
    dataset = make(model, tmp_path)
    assert len(dataset) == 10
    x0, x1, prompts = dataset[torch.tensor([7, 0])]
    assert prompts == [PROMPTS[7 % 3], PROMPTS[0]]
    first_seed = seed_range("reflow", 5, 10)[0]
    assert torch.equal(x0, noise_from_seeds([first_seed + 7, first_seed], (4, 8, 8)))
    context, null = model.encode_prompts(prompts), model.encode_prompts([""])
    with torch.no_grad():
        predict_noise = guided(model.unet, null, 2.0)
        *_, expected = dpm_solver(predict_noise, x0, 2, NoiseSchedule(), context)
    torch.testing.assert_close(x1, expected, atol=2e-3, rtol=2e-3)  # stored as fp16
    description = json.loads((tmp_path / "pairs.json").read_text())
    assert description["count"] == 10 and description["solver"] == "dpm"
    assert description["teacher"] == "a.safetensors"
    assert len(list(tmp_path.glob("shard-*.safetensors"))) == 3


def test_only_missing_shards_are_generated(model, tmp_path, monkeypatch):
    make(model, tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.glob("shard-*")}
    (tmp_path / "shard-00001.safetensors").unlink()
    mtimes = {path.name: path.stat().st_mtime_ns for path in tmp_path.glob("shard-*")}
    make(model, tmp_path)
    for path in tmp_path.glob("shard-*"):
        assert path.read_bytes() == before[path.name]
        assert mtimes.get(path.name, path.stat().st_mtime_ns) == path.stat().st_mtime_ns
    monkeypatch.setattr(pairs, "sample_latents", None)  # nothing more to generate
    make(model, tmp_path)


def test_more_pairs_keep_the_existing_ones(model, tmp_path):
    few = make(model, tmp_path, count=6)[torch.arange(6)]
    many = make(model, tmp_path, count=10)
    assert len(many) == 10
    assert torch.equal(many[torch.arange(4)][1], few[1][:4])
    torch.testing.assert_close(many[torch.arange(6)][1], few[1], atol=1e-2, rtol=1e-2)
    assert len(make(model, tmp_path, count=5)) == 5


def test_batch_size_changes_only_rounding(model, tmp_path):
    a = make(model, tmp_path / "a", batch_size=1)[torch.arange(10)][1]
    b = make(model, tmp_path / "b", batch_size=4)[torch.arange(10)][1]
    torch.testing.assert_close(a, b, atol=1e-2, rtol=1e-2)


@pytest.mark.parametrize(
    "change, words",
    [
        ({"steps": 3}, "steps was 2, now 3"),
        ({"guidance": 1.0}, "guidance was 2.0, now 1.0"),
        ({"seed": 6}, "first_seed was"),
        ({"solver": "ddim"}, "solver was 'dpm', now 'ddim'"),
        ({"prompts": ["else"]}, "prompts_hash was"),
    ],
)
def test_changed_settings_are_refused_by_name(model, tmp_path, change, words):
    make(model, tmp_path)
    with pytest.raises(BadInput, match=words):
        make(model, tmp_path, **change)


def test_finished_pairs_are_not_locked(model, tmp_path):
    make(model, tmp_path)
    assert tmp_path.resolve() not in command.LOCKS


def test_pairs_of_another_dtype_are_refused(model, tmp_path):
    make(model, tmp_path)
    bf16_model = checkpoint.load(model.path, dtype=torch.bfloat16)
    with pytest.raises(BadInput, match="dtype was 'fp32', now 'bf16'"):
        make(bf16_model, tmp_path)


def test_another_teacher_is_refused(model, tmp_path):
    make(model, tmp_path)
    write_single_file(make_model(seed=1), tmp_path / "a.safetensors")
    other = checkpoint.load(tmp_path / "a.safetensors")
    other.tokenizer = model.tokenizer
    with pytest.raises(BadInput, match="teacher_hash was"):
        make(other, tmp_path)


def test_a_damaged_shard_is_named_and_repaired(model, tmp_path):
    expected = make(model, tmp_path)[torch.arange(10)][1]
    path = tmp_path / "shard-00001.safetensors"
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(BadInput, match="shard-00001.safetensors: damaged.*--repair"):
        make(model, tmp_path)
    assert torch.equal(make(model, tmp_path, repair=True)[torch.arange(10)][1], expected)


def test_latents_that_are_not_finite_are_refused(model, tmp_path, monkeypatch):
    monkeypatch.setattr(
        pairs, "sample_latents", lambda *a, **k: torch.full((3, 4, 8, 8), float("nan"))
    )
    with pytest.raises(BadInput, match="latent of pair 0 is not finite"):
        make(model, tmp_path, count=3)
    assert not list(tmp_path.glob("shard-*"))


# Prompts


def test_prompts_are_read_from_txt_tsv_and_csv(tmp_path, capsys):
    command.note.cache_clear()
    text = tmp_path / "p.txt"
    text.write_text("a cat\n\n  a dog \n\n")
    assert read_prompts(text) == ["a cat", "a dog"]
    assert capsys.readouterr().err.count("2 blank lines are skipped") == 1
    table = tmp_path / "p.tsv"
    table.write_text('Prompt\tNote\na cat\tx\na "quoted" dog\ty\n')
    assert read_prompts(table) == ["a cat", 'a "quoted" dog']
    table = tmp_path / "p.csv"
    table.write_text('id,caption\n1,"a cat, asleep"\n')
    assert read_prompts(table, "caption") == ["a cat, asleep"]
    with pytest.raises(BadInput, match="no column 'Prompt'"):
        read_prompts(table)


def test_unclosed_quotes_and_strange_line_ends_in_prompts_are_read(tmp_path):
    """LAION's captions have unclosed quotes, and U+2028 and U+0085 within a line."""
    table = tmp_path / "p.tsv"
    strange = "a line\u2028break and\x85another"
    two_quotes = '"Star Wars" vs "Star Trek"'
    table.write_text(
        f'Prompt\tNote\n"a sign that says\tx\na dog\ty\n"a ""quoted"" cat"\tz\n'
        f'{strange}\tz\n{two_quotes}\tx\na\rb\n', newline=""
    )
    assert read_prompts(table) == [
        '"a sign that says', "a dog", 'a "quoted" cat', strange, two_quotes, "a b"
    ]
    text = tmp_path / "p.txt"
    text.write_text(f"{strange}\r\na cat", newline="")
    assert read_prompts(text) == [strange, "a cat"]
    table = tmp_path / "p.csv"
    table.write_text(f'id,caption\n1,"a cat,\nasleep"\n2,{strange}\n')
    assert read_prompts(table, "caption") == ["a cat, asleep", strange]
    table.write_text('id,caption\n1,"a cat\n2,a dog\n')
    with pytest.raises(BadInput, match="p.csv: not a .csv table up to line 3"):
        read_prompts(table, "caption")


@pytest.mark.parametrize(
    "content, words",
    [(b"", "holds no prompt"), (b"\n \n", "holds no prompt"), (b"\xff\xfea", "not UTF-8")],
)
def test_empty_and_unreadable_prompt_files_are_refused(tmp_path, content, words):
    path = tmp_path / "p.txt"
    path.write_bytes(content)
    with pytest.raises(BadInput, match=words):
        read_prompts(path)
    with pytest.raises(BadInput, match="cannot be read"):
        read_prompts(tmp_path / "none.txt")


def test_built_in_prompts_are_all_different():
    prompts = built_in_prompts()
    assert len(set(prompts)) == len(prompts) == 6 * 8 * 16 * 8
    assert prompts == built_in_prompts()
