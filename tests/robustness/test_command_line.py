"""The command line with options, models and adapters that are not right: one line, before work starts."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from mobizo_cli import model as models
from mobizo_cli.errors import ModelError, OptionError, one_line
from mobizo_cli.options import BuildOptions
from mobizo_cli.task import TextTask, template_columns
from runtime_driver.adapter_config import check_config
from runtime_driver.errors import AdapterError
from runtime_driver.format import Manifest
from tests.driver import text_model
from tests.driver.command import fails
from tests.driver.conftest import cli  # noqa: F401

FIXTURES = Path(__file__).parents[1] / "fixtures" / "v0_1"
LABELS = "0=terrible,1=great"


def options(model: Path | str, **changed: Any) -> BuildOptions:
    given = {
        "model": str(model),
        "template": "{text} It was",
        "labels": LABELS,
        "label_column": "label",
        "loss": "label-words",
        "max_length": 8,
        "init_seed": 0,
        "trainable": "lora_B",
        "batch": 2,
        "queries": 1,
        "estimator": "two-sided",
        "noise": "gaussian",
        **dict.fromkeys(("rank", "alpha", "target_modules", "layers", "normalize")),
    }
    return BuildOptions(**{**given, **changed})


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return text_model.save_model(tmp_path_factory.mktemp("robust") / "model")


def base(model: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(model)


@pytest.fixture(scope="module")
def adapter(model: Path) -> Path:
    """A PEFT directory with non-zero B."""
    import peft

    torch.manual_seed(1)
    config = peft.LoraConfig(r=2, lora_alpha=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    adapted = peft.get_peft_model(base(model), config)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    adapted.save_pretrained(str(model.with_name("adapter")))
    return model.with_name("adapter")


# Options


@pytest.mark.parametrize(
    "template",
    [
        *(
            "{text!z}",
            "{text!r}",
            "{text!s}",
            "{text:d}",
            "{text:{text.__class__}}",
            "{text:99999999999}",
            "{text:{{}}}",
        ),
        *("{text.attr}", "{text[0]}", "{0}", "{}", "{ text }", "{a b}", "{\x00}", "{text", "text}", "", "It was"),
        "\udcff{text}",
    ],
)
def test_templates_hold_plain_names_only(template: str):
    with pytest.raises(OptionError, match="--template"):
        template_columns(template)


def test_braces_in_data_and_template_are_text():
    task = TextTask("{{x}} {a}{b}:", "y", ("0", "1"), ("a", "b"), (1, 2), "label-words", 8, "t")
    assert task.prompt({"a": "{b!z}", "b": "{"}) == "{x} {b!z}{:"


BAD_OPTIONS = [
    ({"alpha": 0.0}, "--alpha 0.0"),
    ({"alpha": -1.0}, "--alpha -1.0"),
    ({"alpha": float("nan")}, "--alpha nan"),
    ({"alpha": float("inf")}, "--alpha inf"),
    ({"alpha": 1e-60}, "--alpha 1e-60"),
    ({"layers": "²"}, "--layers"),
    ({"layers": "0-999999999"}, "--layers"),
    ({"layers": "9" * 5000}, "--layers"),
    ({"layers": "-1"}, "--layers"),
    ({"target_modules": " , "}, "--target-modules"),
    ({"target_modules": ""}, "--target-modules"),
    ({"label_column": " "}, "--label-column"),
    ({"label_column": "\udcff"}, "--label-column"),
    ({"labels": "0=\udcff,1=b"}, "--labels"),
    ({"batch": 10**9}, "--batch 1000000000"),
    ({"max_length": 10**9}, "--max-length 1000000000"),
    ({"queries": 10**9}, "--queries 1000000000"),
]


@pytest.mark.parametrize(("changed", "words"), BAD_OPTIONS, ids=[str(each)[:40] for each, _ in BAD_OPTIONS])
def test_options_are_refused_before_a_model_is_loaded(changed: dict[str, Any], words: str):
    from mobizo_cli.build import prepare

    with pytest.raises(OptionError) as caught:
        prepare(options("no-such-model", **changed), "t")
    assert words in str(caught.value)


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"layers": "1,7-9"}, "layers 0 to 1; there can be no LoRA in `7`, `8`, `9`"),
        ({"target_modules": "q_proj,z_proj"}, "no LoRA on 'z_proj'"),
        ({"rank": 10**9}, "--rank 1000000000"),
        ({"new_weights": "lm_head"}, "--new-weights lm_head: no such weight"),
        ({"unused_weights": "score"}, "--unused-weights score: no such weight"),
    ],
)
def test_what_the_model_does_not_have(model: Path, changed: dict[str, Any], words: str):
    with pytest.raises(OptionError, match=words):
        models.load(options(model, **changed))


def test_a_template_leaves_room_for_a_token(model: Path):
    from mobizo_cli.build import prepare

    for loss, length in (("label-words", 2), ("vocabulary", 3)):
        with pytest.raises(OptionError, match=f"--max-length {length}: .* 2 tokens.* at least {length + 1}"):
            prepare(options(model, loss=loss, max_length=length), "t")


LOWER = ["lower", "no", "--template", "{t}", "--labels", LABELS, "-o", "m.pte"]
USED: list[tuple[list[str], list[str]]] = [
    (["lower", "no", "--template", "{text!r}", "--labels", LABELS, "-o", "m.pte"], ["--template"]),
    (["lower", "no", "--template", "{t}", "--labels", LABELS, "-o", "d.pte"], ["d.pte is a directory"]),
    (["lower", "no", "--template", "{t}", "--labels", LABELS, "-o", "n.pte"], ["n.json is not a manifest of ours"]),
    (["lower", "no", "--template", "{t}", "--labels", LABELS, "-o", "t.pte"], ["t.tokenizer/mine", "not a file of"]),
    (["lower", "no", "--template", "{t}", "--labels", LABELS, "-o", "f/m.pte"], ["f does not exist", "--output"]),
    (["lower", "", "--template", "{t}", "--labels", LABELS, "-o", "m.pte"], ["MODEL is empty"]),
    (["lower", "f", "--template", "{t}", "--labels", LABELS, "-o", "m.pte"], ["f is a file"]),
    ([*LOWER, "--precision", "x"], ["precision='x' is not possible", "expected one of fp32"]),
    ([*LOWER, "--option", "soc=SM8650"], ["'xnnpack' has no option 'soc'", "its options are precision, weights"]),
    ([*LOWER, "--option", "soc"], ["--option 'soc'", "expected KEY=VALUE"]),
    ([*LOWER, "--option", "=x"], ["--option '=x'", "expected KEY=VALUE"]),
    ([*LOWER, "--precision", "fp32", "--option", "precision=fp32"], ["'precision' is given already", "once"]),
    (["lower", "a\0b", "--template", "{t}", "--labels", LABELS, "-o", "m.pte"], ["zero byte"]),
    (["inspect", "no", "--graph", "f/g.svg"], ["--graph f/g.svg", "f does not exist"]),
    (["inspect", "no", "--graph", "g.html"], ["--graph g.html: is a directory"]),
    (["inspect", "d.pte"], ["d.pte"]),
    (["inspect", "no\n\x1b[31m.pte"], ["no \\x1b[31m.pte"]),
    (["inspect", "m" * 5000 + ".pte"], ["mmm"]),
    (["eval", "d.pte", "--data", "x.csv"], ["d.pte"]),
]


@pytest.mark.parametrize(("arguments", "words"), USED)
def test_one_line_and_nothing_changed(
    cli: Callable,  # noqa: F811
    tmp_path: Path,
    arguments: list[str],
    words: list[str],
):
    (tmp_path / "d.pte").mkdir()
    (tmp_path / "d.pte" / "mine").write_text("mine")
    (tmp_path / "n.json").write_text("my notes")
    (tmp_path / "g.html").mkdir()
    (tmp_path / "t.tokenizer").mkdir()
    (tmp_path / "t.tokenizer" / "mine").write_text("mine")
    (tmp_path / "f").write_text("mine")
    before = sorted(tmp_path.rglob("*"))
    fails(cli(*arguments), *words)
    assert sorted(tmp_path.rglob("*")) == before
    assert (tmp_path / "n.json").read_text() == "my notes"


def test_messages_are_one_line_without_control_characters():
    assert one_line(OSError(2, "No such file", "a\nb\x1b[0m")) == "a b\\x1b[0m: No such file"
    assert len(one_line(OSError(36, "File name too long", "x" * 5000))) < 900
    assert "not enough memory" in one_line(MemoryError())


# What a program's manifest says of its task


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("tokenizer", "../portable.tokenizer"),
        ("tokenizer", "/etc"),
        ("tokenizer", ".."),
        ("tokenizer", ""),
        ("tokenizer", 1),
        ("template", "{text!r}"),
        ("template", "{text.__class__}"),
        ("template", None),
        ("label_ids", [4, True]),
        ("label_ids", [4]),
        ("label_words", "ab"),
        ("max_length", 10**12),
        ("loss", "other"),
        ("tokenizer_sha256", {"tokenizer.json": 1}),
    ],
)
def test_a_task_that_was_tampered_with(field: str, value: object):
    data = json.loads((FIXTURES / "portable.json").read_text())
    TextTask.of(Manifest.from_dict(data), Path("m.pte"))
    data["application"][field] = value
    with pytest.raises(ModelError, match=r"^m\.pte: "):
        TextTask.of(Manifest.from_dict(data), Path("m.pte"))


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"r": 4}, "`r` is 4, but 3 in the program"),
        ({"lora_alpha": 1}, "`lora_alpha` is 1"),
        ({"use_rslora": True}, "`use_rslora` is True"),
        ({"alpha_pattern": {"q_proj": 1}}, "`alpha_pattern`"),
        ({"peft_type": "ADALORA"}, "`peft_type` is 'ADALORA'"),
        ("[" * 100_000, "not JSON"),
        (None, "cannot be read"),
    ],
)
def test_an_adapter_of_another_configuration_is_not_the_programs(tmp_path: Path, config: Any, words: str):
    manifest = Manifest.load(FIXTURES / "portable.json")
    directory = Path(shutil.copytree(FIXTURES / "portable.adapter", tmp_path / "a"))
    path = directory / "adapter_config.json"
    check_config(directory, manifest.peft)
    if isinstance(config, dict):
        config = json.dumps({**json.loads(path.read_text()), **config})
    path.unlink() if config is None else path.write_text(config)
    with pytest.raises(AdapterError, match=words):
        check_config(directory, manifest.peft)


# Base models with other weights than theirs


def rewritten(
    model: Path, directory: Path, change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]
) -> Path:
    shutil.copytree(model, directory)
    weights = directory / "model.safetensors"
    save_file(change(load_file(weights)), weights, metadata={"format": "pt"})
    return directory


def without(*names: str) -> Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]:
    return lambda tensors: {name: tensor for name, tensor in tensors.items() if not name.startswith(names)}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (without("lm_head"), r"weights of LlamaForCausalLM are absent.* \(1\): `lm_head.weight`"),
        (without("model.layers.1.mlp"), r"\(3\): `model.layers.1.mlp.down_proj.weight`"),
        (
            lambda t: {**t, "score.weight": torch.ones(2, 32)},
            r"weights that LlamaForCausalLM has no place for \(1\): `score.weight`",
        ),
        (lambda t: {**t, "lm_head.weight": torch.ones(7, 32)}, r"`lm_head.weight \(\[7, 32\] instead of \[13, 32\]\)`"),
    ],
)
def test_weights_that_do_not_match_are_named(model: Path, tmp_path: Path, change: Callable, words: str):
    with pytest.raises(ModelError, match=words):
        models.load(options(rewritten(model, tmp_path / "m", change)))


def test_new_and_unused_weights_are_allowed_by_name(model: Path, tmp_path: Path):
    def change(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {**without("lm_head")(tensors), "score.weight": torch.ones(2, 32)}

    path = rewritten(model, tmp_path / "m", change)
    allowed = {"new_weights": "lm_head", "unused_weights": "score.weight"}
    heads = [
        models.load(options(path, **allowed, init_seed=seed)).model.get_base_model().lm_head.weight  # pyright: ignore
        for seed in (0, 0, 1)
    ]
    assert torch.equal(heads[0], heads[1])
    assert not torch.equal(heads[0], heads[2])


def test_tied_weights_are_complete(model: Path, tmp_path: Path):
    path = rewritten(model, tmp_path / "m", without("lm_head"))
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": True}))
    models.load(options(path))


# Adapters from elsewhere


def changed(adapter: Path, directory: Path, rename: Callable[[str], str]) -> Path:
    shutil.copytree(adapter, directory)
    weights = directory / "adapter_model.safetensors"
    tensors = {rename(key): tensor for key, tensor in load_file(weights).items()}
    save_file({key: tensor for key, tensor in tensors.items() if key}, weights)
    return directory


def factors(loaded: models.Loaded) -> dict[str, torch.Tensor]:
    state = {name: value for name, value in loaded.model.state_dict().items() if "lora_" in name}
    assert len(state) == 8
    return state


PREFIX = "base_model.model."
KNOWN = {
    "as PEFT writes": lambda key: key,
    "no prefix": lambda key: key.removeprefix(PREFIX),
    "doubled": lambda key: PREFIX + key,
    "compiled": lambda key: f"_orig_mod.{key}",
    "compiled inside": lambda key: key.replace(PREFIX, f"{PREFIX}_orig_mod."),
    "parallel": lambda key: f"module.{key}",
    "bare layers": lambda key: key.removeprefix(f"{PREFIX}model."),
    "with the adapter's name": lambda key: key.replace(".weight", ".default.weight"),
}


@pytest.mark.parametrize("form", KNOWN)
def test_known_prefixes_are_recognized(model: Path, adapter: Path, tmp_path: Path, form: str):
    stored = load_file(adapter / "adapter_model.safetensors")
    found = factors(models.load(options(changed(adapter, tmp_path / "a", KNOWN[form]))))
    for key, tensor in stored.items():
        assert torch.equal(found[key.replace(".weight", ".default.weight")], tensor)


@pytest.mark.parametrize(
    "lora",
    [
        {"target_modules": ["q_proj", "embed_tokens", "lm_head"]},
        {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
        {"target_modules": ["v_proj"], "use_dora": True, "rank_pattern": {"layers.1.self_attn.v_proj": 3}},
        {"target_modules": ["v_proj"], "trainable_token_indices": [1, 3], "lora_bias": True},
    ],
)
@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`")
def test_everything_that_peft_saves_is_loaded(model: Path, tmp_path: Path, lora: dict[str, Any]):
    import peft

    adapted = peft.get_peft_model(base(model), peft.LoraConfig(r=2, lora_alpha=4, task_type="CAUSAL_LM", **lora))
    adapted = adapted.eval()
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter))
    adapted.save_pretrained(str(tmp_path / "a"))
    loaded = models.load(options(tmp_path / "a")).model
    tokens = torch.tensor([[2, 3, 4, 1]])
    assert torch.equal(loaded(input_ids=tokens).logits, adapted(input_ids=tokens).logits)


@pytest.mark.parametrize(
    ("rename", "words"),
    [
        (lambda key: key.replace("layers.", "blocks."), "8 tensors find no place.*8 of the adapter's tensors are not"),
        (lambda key: key.replace("layers.1", "layers.2"), "4 tensors find no place.*layers.2"),
        (lambda key: "" if "layers.1" in key else key, "4 of the adapter's tensors are not in it.*layers.1"),
        (lambda key: key.replace("layers.1.self_attn.q_proj.lora_B", "x"), "1 tensors find no place"),
        (lambda key: "", "8 of the adapter's tensors"),
    ],
)
def test_tensors_without_a_place_and_places_without_a_tensor(
    adapter: Path, tmp_path: Path, rename: Callable, words: str
):
    with pytest.raises(ModelError, match=words):
        models.load(options(changed(adapter, tmp_path / "a", rename)))


def test_adapters_of_named_directories(adapter: Path, tmp_path: Path):
    out = tmp_path / "out"
    shutil.copytree(adapter, out / "mine")
    assert factors(models.load(options(out)))
    shutil.copytree(adapter, out / "other")
    with pytest.raises(ModelError, match=r"2 adapters \(mine, other\)"):
        models.load(options(out))


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"peft_type": "IA3"}, "IA³"),
        ({"peft_type": "PROMPT_TUNING"}, "prompt tuning"),
        ({"peft_type": "PREFIX_TUNING"}, "prefix tuning"),
        ({"peft_type": "P_TUNING"}, "p-tuning"),
        ({"peft_type": "NO_SUCH_KIND"}, "cannot load the adapter"),
        ({"peft_type": None}, "no `peft_type`"),
        ({"base_model_name_or_path": ""}, "no `base_model_name_or_path`"),
        ({"base_model_name_or_path": "."}, "base model . is an adapter itself"),
        ({"r": 3}, "the adapter of its own configuration"),
        ({"target_modules": ["q_proj"]}, "4 tensors find no place"),
        ("[" * 100_000, "nested too deeply|not JSON"),
        ("[]", "expected a JSON object"),
        (b"\xff", "not JSON"),
    ],
)
def test_other_kinds_and_configurations(
    adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, config: dict | str | bytes, words: str
):
    shutil.copytree(adapter, tmp_path / "a")
    monkeypatch.chdir(tmp_path / "a")
    path = tmp_path / "a" / "adapter_config.json"
    if isinstance(config, dict):
        config = json.dumps({**json.loads(path.read_text()), **config})
    path.write_bytes(config if isinstance(config, bytes) else config.encode())
    with pytest.raises(ModelError, match=words):
        models.load(options(tmp_path / "a"))
