import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
import torch.nn.functional as F
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel, LlamaForCausalLM

from lightning_replay import (
    EMA,
    CausalLM,
    Copy,
    ForgettingMonitor,
    Model,
    SelfGeneratedReplay,
    TextDataModule,
    interpolate,
)
from lightning_replay.cli.main import main
from tests.helpers.chat import WORDS, chat_tokenizer
from tests.helpers.modules import HandWritten, TokensModule, UserModule, mapping_loader, quiet_trainer, tensor_loader

NEW = mapping_loader(rows=16)
PRIOR = DataLoader([{"input_ids": row, "labels": row} for row in torch.arange(8 * 12).reshape(8, 12) % 32], 8)  # type: ignore[arg-type, var-annotated]


@pytest.fixture
def base(tiny_llama: Any, tmp_path: Path) -> Path:
    """The folder of a tiny model."""
    tiny_llama(initializer_range=0.2).save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def finetuned(base: Path, *callbacks: L.Callback, **options: Any) -> tuple[CausalLM, Path]:
    """A ``CausalLM`` after a few steps, with the checkpoint."""
    L.seed_everything(5, verbose=False)
    module = CausalLM(base, 1e-2, **options)
    trainer = quiet_trainer(callbacks=list(callbacks))
    trainer.fit(module, mapping_loader())
    trainer.save_checkpoint(base.parent / "last.ckpt")
    return module, base.parent / "last.ckpt"


def loss_by_hand(model: nn.Module, batches: Any) -> float:
    total, count = 0.0, 0
    for batch in batches:
        with torch.no_grad():
            logits = model(batch["input_ids"]).logits[:, :-1].double()
        targets = batch["input_ids"][:, 1:]
        total += float(F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum"))
        count += targets.numel()
    return total / count


def average(before: nn.Module, after: nn.Module, share: float) -> dict[str, Tensor]:
    theirs = after.state_dict()
    return {name: (1 - share) * weight + share * theirs[name] for name, weight in before.state_dict().items()}


def load(folder: Path) -> LlamaForCausalLM:
    model: LlamaForCausalLM = AutoModelForCausalLM.from_pretrained(folder)
    return model


def test_a_sweep_measures_hand_made_averages_of_two_folders(base: Path) -> None:
    module, _ = finetuned(base, save_to=base.parent / "tuned")
    found = interpolate(base.parent / "tuned", NEW, {"prior": PRIOR}, base=base, weights=(0.25, 1.0))
    assert [point.weight for point in found.points] == [0.0, 0.25, 1.0]
    assert found.chosen is None
    between = load(base)
    between.load_state_dict(average(load(base), module.model, 0.25))
    for point, model in zip(found.points, (load(base), between, module.model), strict=True):
        assert point.new_loss == pytest.approx(loss_by_hand(model, NEW), rel=1e-6)
        assert point.prior_loss == {"prior": pytest.approx(loss_by_hand(model, PRIOR), rel=1e-6)}
        assert point.forgetting == {"prior": point.prior_loss["prior"] - found.points[0].prior_loss["prior"]}
        assert math.isnan(point.forgetting_error)


@pytest.mark.parametrize("save", ["inside", "beside"])
def test_the_ends_of_a_checkpoint_measure_what_the_monitor_did_bit_for_bit(
    base: Path, tiny_llama: Any, save: Any
) -> None:
    monitor = ForgettingMonitor({"fresh": NEW, "prior": PRIOR}, every_n_steps=0, self_rows=8)
    _, checkpoint = finetuned(base, SelfGeneratedReplay(reference=Copy(save=save)), monitor)
    other = CausalLM(tiny_llama(seed=9))  # neither end is in it
    found = interpolate(checkpoint, NEW, {"prior": PRIOR}, module=other, weights=(1.0,), self_rows=8, seed=5)
    first, last = found.points
    values, start = monitor.state_dict()["values"], monitor.baseline
    assert [first.new_loss, first.prior_loss["prior"]] == [start["fresh"], start["prior"]]
    assert [last.new_loss, last.prior_loss["prior"]] == [values["prior_loss/fresh"], values["prior_loss/prior"]]
    assert last.forgetting == {"prior": values["forgetting/prior"], "self": values["forgetting/self"]}
    assert last.forgetting_error == values["forgetting_error/self"]
    assert first.forgetting == {"prior": 0.0, "self": 0.0}
    assert values["forgetting/self"] > 0.01


def test_a_monitor_s_exact_reference_goes_before_a_rounded_one(base: Path) -> None:
    monitor = ForgettingMonitor(self_rows=4)
    _, checkpoint = finetuned(base, SelfGeneratedReplay(reference=Copy(dtype="bfloat16")), monitor)
    first, _ = interpolate(checkpoint, NEW, weights=(1.0,), self_rows=4).points
    assert first.new_loss == pytest.approx(loss_by_hand(load(base), NEW), rel=1e-6)


def test_a_checkpoint_of_a_plain_fit_begins_at_the_model_that_it_was_made_of(base: Path) -> None:
    module, checkpoint = finetuned(base)
    first, last = interpolate(checkpoint, NEW, weights=(1.0,), self_rows=4).points
    assert first.new_loss == pytest.approx(loss_by_hand(load(base), NEW), rel=1e-6)
    assert last.new_loss == pytest.approx(loss_by_hand(module.model, NEW), rel=1e-6)


def test_the_saved_folder_holds_the_hand_made_average(base: Path) -> None:
    module, checkpoint = finetuned(base)
    chosen = base.parent / "chosen"
    found = interpolate(checkpoint, NEW, self_rows=4, weights=(0.5, 1.0), save=chosen, save_weight=0.5)
    assert found.chosen == 0.5
    expected, saved, tokens = load(base), load(chosen), torch.randint(32, (2, 9))
    expected.load_state_dict(average(load(base), module.model, 0.5))
    torch.testing.assert_close(saved(tokens).logits, expected(tokens).logits)
    interpolate(checkpoint, NEW, self_rows=4, weights=(1.0,), save=chosen, save_weight=1.0)
    assert torch.equal(load(chosen)(tokens).logits, module.model.eval()(tokens).logits)


def test_the_lowest_new_loss_within_the_allowed_forgetting_is_chosen_and_marked(base: Path, tmp_path: Path) -> None:
    _, checkpoint = finetuned(base)
    weights = (0.0, 0.3, 0.6, 1.0)
    first = interpolate(checkpoint, NEW, {"prior": PRIOR}, self_rows=4, weights=weights)
    most = [max(point.forgetting.values()) for point in first.points]
    assert most == sorted(most)
    allowed = (most[2] + most[3]) / 2
    found = interpolate(checkpoint, NEW, {"prior": PRIOR}, self_rows=4, weights=weights, max_forgetting=allowed)
    assert found.points == first.points
    losses = [point.new_loss for point in first.points[:3]]
    assert found.chosen == weights[losses.index(min(losses))]
    lines = found.table().splitlines()
    assert lines[0] == "| weight | new-task loss | forgetting/prior | forgetting/self |"
    assert [line.split(" | ")[0] for line in lines[2:]] == [
        f"| {weight:g}{' (chosen)' * (weight == found.chosen)}" for weight in weights
    ]
    assert f"{first.points[3].new_loss:.4f}" in lines[-1]
    found.plot(tmp_path / "picture.png")
    assert (tmp_path / "picture.png").read_bytes().startswith(b"\x89PNG")


def test_the_weight_of_an_adapter_scales_what_it_adds(base: Path) -> None:
    settings = {"peft_type": "LORA", "r": 2, "target_modules": "all-linear"}
    module, checkpoint = finetuned(base, SelfGeneratedReplay(), adapter=settings)
    chosen = base.parent / "chosen"
    first, *_ = interpolate(checkpoint, NEW, weights=(0.5, 1.0), self_rows=4, save=chosen, save_weight=0.5).points
    assert first.new_loss == pytest.approx(loss_by_hand(load(base), NEW), rel=1e-6)
    layers: Iterable[Any] = module.model.modules()
    for layer in layers:
        if hasattr(layer, "lora_A"):
            layer.scaling["default"] *= 0.5
    tokens = torch.randint(32, (2, 9))
    torch.testing.assert_close(load(chosen)(tokens).logits, module.model.eval()(tokens).logits)


@pytest.mark.parametrize("replays", [True, False])
def test_modules_that_an_adapter_saves_begin_as_they_were(base: Path, replays: bool) -> None:
    settings = {"peft_type": "LORA", "r": 2, "target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}
    module, checkpoint = finetuned(base, *([SelfGeneratedReplay()] if replays else []), adapter=settings)
    found = interpolate(checkpoint, NEW, weights=(0.5, 1.0), self_rows=4)
    first, between, last = found.points
    assert first.new_loss == pytest.approx(loss_by_hand(load(base), NEW), rel=1e-6)
    assert first.forgetting == {"self": 0.0}
    adapted: Any = module.model
    merged = adapted.merge_and_unload()
    assert last.new_loss == pytest.approx(loss_by_hand(merged, NEW), rel=1e-6)
    halfway = load(base)
    halfway.load_state_dict(average(load(base), merged, 0.5))
    assert between.new_loss == pytest.approx(loss_by_hand(halfway, NEW), rel=1e-6)


def test_a_plain_fit_of_an_adapter_that_trains_weights_under_it_needs_the_model_before(tmp_path: Path) -> None:
    GPT2LMHeadModel(
        GPT2Config(vocab_size=32, n_embd=16, n_layer=1, n_head=2, n_positions=32, bos_token_id=1, eos_token_id=2)
    ).save_pretrained(tmp_path / "base")
    settings = {"peft_type": "LORA", "r": 2, "target_modules": ["c_attn"], "bias": "lora_only", "fan_in_fan_out": True}
    _, checkpoint = finetuned(tmp_path / "base", adapter=settings)
    with pytest.raises(MisconfigurationException, match="holds no model before"):
        interpolate(checkpoint, NEW, weights=(1.0,), self_rows=4)
    first, _ = interpolate(checkpoint, NEW, base=tmp_path / "base", weights=(1.0,), self_rows=4).points
    before = GPT2LMHeadModel.from_pretrained(tmp_path / "base").eval()
    assert first.new_loss == pytest.approx(loss_by_hand(before, NEW), rel=1e-6)


def test_a_loader_that_shuffles_gives_the_same_batches_at_each_weight(base: Path) -> None:
    _, checkpoint = finetuned(base)
    shuffled = mapping_loader(rows=64, batch_size=2, shuffle=True)
    found = interpolate(checkpoint, NEW, {"one": shuffled, "other": shuffled}, weights=(0.5, 1.0), max_batches=2)
    for point in found.points:
        assert point.prior_loss["one"] == point.prior_loss["other"]


def test_a_module_of_one_s_own_is_interpolated(tmp_path: Path) -> None:
    torch.manual_seed(0)
    module, loader = TokensModule(HandWritten()), tensor_loader(rows=16)
    monitor = ForgettingMonitor({"fresh": loader}, every_n_steps=0)
    trainer = quiet_trainer(callbacks=[monitor])
    trainer.fit(module, loader)
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    found = interpolate(
        tmp_path / "last.ckpt", loader, {"same": loader}, module=TokensModule(HandWritten()), weights=(0.5, 1.0)
    )
    start, end = monitor.baseline["fresh"], monitor.state_dict()["values"]["prior_loss/fresh"]
    assert [found.points[place].prior_loss["same"] for place in (0, 2)] == [start, end]
    assert [found.points[place].new_loss for place in (0, 2)] == [start, end]


def test_the_global_random_state_stays(base: Path) -> None:
    _, checkpoint = finetuned(base)
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    interpolate(checkpoint, NEW, weights=(1.0,), self_rows=4)
    assert torch.equal(torch.rand(1), expected)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"weights": (0.5, 1.5)}, "`weights` are shares"),
        ({"weights": (0.0,)}, "at least one share above 0"),
        ({"save": "s"}, "`save` needs to know which model"),
        ({"save": "s", "save_weight": 0.55}, "`save_weight` is one of the `weights`"),
        ({"save_weight": 0.5}, "`save_weight` would have no effect"),
        ({"save": "s", "save_weight": 0.5, "max_forgetting": 0.1}, "both choose"),
        ({"max_forgetting": -0.1}, "`max_forgetting` is at least 0"),
        ({"max_batches": 0}, "`max_batches` is at least 1"),
        ({"seed": -1}, "`seed` is a whole number"),
        ({"prior": {"new": PRIOR}}, "a name of its own"),
        ({"prior": {"prior": PRIOR}, "sequence_length": 8}, "`sequence_length` would have no effect"),
        ({"base": None}, "`base` is missing"),
        ({"language_model": "model"}, "`language_model` would have no effect"),
    ],
)
def test_arguments_that_cannot_work_are_refused(base: Path, options: Mapping[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        interpolate(base, NEW, **{"base": base} | dict(options))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"vocab_size": 40}, "other sizes or vocabularies"),
        ({"num_hidden_layers": 3}, "only one of them has it"),
        ({"num_hidden_layers": 1}, "only one of them has it"),
        ({"dtype": torch.bfloat16}, "which would round it"),
    ],
)
def test_models_of_other_shapes_are_refused(base: Path, tiny_llama: Any, changes: dict[str, Any], message: str) -> None:
    dtype = changes.pop("dtype", torch.float32)
    tiny_llama(**changes).to(dtype).save_pretrained(base.parent / "other")
    with pytest.raises(MisconfigurationException, match=message):
        interpolate(base.parent / "other", NEW, base=base)


def test_data_of_another_tokenizer_are_refused(base: Path, tmp_path: Path) -> None:
    tokenizer = chat_tokenizer()
    tokenizer.save_pretrained(base.parent / "base")
    tokenizer.add_tokens(["new"])
    (tmp_path / "new.txt").write_text(" ".join(WORDS * 40))
    with pytest.raises(MisconfigurationException, match="1 tokens differ, such as 'new'"):
        interpolate(base, TextDataModule(tmp_path / "new.txt", tokenizer, 16), base=base)


def test_a_set_without_batches_is_refused(base: Path) -> None:
    with pytest.raises(MisconfigurationException, match="`new` gave no batch"):
        interpolate(base, [], base=base)


def saved_by(module: L.LightningModule, folder: Path, *callbacks: L.Callback) -> Path:
    trainer = quiet_trainer(callbacks=list(callbacks), max_steps=2)
    trainer.fit(module, mapping_loader())
    trainer.save_checkpoint(folder / "last.ckpt")
    return folder / "last.ckpt"


@pytest.mark.parametrize(
    ("callbacks", "message"),
    [
        ([], "holds no model before"),
        ([SelfGeneratedReplay(reference=EMA())], "a moving average"),
        ([SelfGeneratedReplay(reference=Copy(dtype="bfloat16"))], "not exactly the model before"),
        ([SelfGeneratedReplay(reference=Model("base"))], "another model than the one that trained"),
    ],
)
def test_a_checkpoint_without_the_model_before_is_refused(
    base: Path, tiny_llama: Any, callbacks: Sequence[Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(base.parent)
    checkpoint = saved_by(UserModule(tiny_llama()), base.parent, *callbacks)
    with pytest.raises(MisconfigurationException, match=message):
        interpolate(checkpoint, NEW, module=UserModule(tiny_llama()))
    found = interpolate(checkpoint, NEW, module=UserModule(tiny_llama()), base=base, self_rows=4, weights=(1.0,))
    assert found.points[0].new_loss == pytest.approx(loss_by_hand(load(base), NEW), rel=1e-6)


def test_checkpoints_of_unknown_modules_are_refused(base: Path, tiny_llama: Any, tmp_path: Path) -> None:
    checkpoint = saved_by(UserModule(tiny_llama()), tmp_path)
    with pytest.raises(MisconfigurationException, match="is not that of a `CausalLM`"):
        interpolate(checkpoint, NEW, base=base)
    with pytest.raises(MisconfigurationException, match="are not those of the CausalLM"):
        interpolate(checkpoint, NEW, module=CausalLM(tiny_llama(num_hidden_layers=1)), base=base)
    checkpoint = saved_by(CausalLM(tiny_llama()), tmp_path)
    with pytest.raises(MisconfigurationException, match="made of 'LlamaForCausalLM', which can't be loaded"):
        interpolate(checkpoint, NEW, base=base)
    (tmp_path / "other.ckpt").write_text("text")
    with pytest.raises(MisconfigurationException, match="can't be read as a checkpoint"):
        interpolate(tmp_path / "other.ckpt", NEW)


def test_what_cannot_be_saved_is_refused_before_the_sweep(tmp_path: Path) -> None:
    module, loader = TokensModule(HandWritten()), tensor_loader(rows=16)
    trainer = quiet_trainer(callbacks=[ForgettingMonitor({"fresh": loader})], max_steps=2)
    trainer.fit(module, loader)
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    with pytest.raises(MisconfigurationException, match="saves models of transformers; got HandWritten"):
        interpolate(
            tmp_path / "last.ckpt",
            loader,
            {"same": loader},
            module=TokensModule(HandWritten()),
            save=tmp_path / "s",
            save_weight=1.0,
        )


def test_a_copy_of_a_trained_adapter_is_refused(base: Path) -> None:
    from peft import LoraConfig, get_peft_model

    def adapted() -> CausalLM:
        model = get_peft_model(load(base), LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False))
        return CausalLM(model, 1e-2)

    checkpoint = saved_by(adapted(), base.parent, SelfGeneratedReplay())
    with pytest.raises(MisconfigurationException, match="holds a copy of a model with an adapter"):
        interpolate(checkpoint, NEW, module=adapted())


def test_the_command_writes_table_picture_and_model(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    chat_tokenizer().save_pretrained(base)
    _, checkpoint = finetuned(base, SelfGeneratedReplay())
    for turn, name in enumerate(("new", "prior")):
        (tmp_path / f"{name}.txt").write_text(" ".join([*WORDS[turn:], *WORDS[:turn]] * 40))
    text = "lightning_replay.TextDataModule"
    options = {"tokenizer": str(base), "sequence_length": 16}
    (tmp_path / "sets.yaml").write_text(
        json.dumps({"prior": {"stories": {"class_path": text, "init_args": {"data": "prior.txt", **options}}}})
    )
    monkeypatch.chdir(tmp_path)
    capsys.readouterr()
    main(
        ["interpolate", "--config=sets.yaml", f"--finetuned={checkpoint}", f"--new={text}", "--new.data=new.txt"]
        + [f"--new.{name}={value}" for name, value in options.items()]
        + ["--weights=[0.5, 1.0]", "--max_forgetting=100", "--save=chosen", "--picture=picture.svg", "--self_rows=4"]
    )
    sets = [TextDataModule(f"{name}.txt", chat_tokenizer(), 16) for name in ("new", "prior")]
    found = interpolate(checkpoint, sets[0], {"stories": sets[1]}, weights=(0.5, 1.0), max_forgetting=100, self_rows=4)
    assert capsys.readouterr().out.strip() == found.table()
    assert found.chosen == min(found.points, key=lambda point: point.new_loss).weight
    assert loss_by_hand(load(Path("chosen")), sets[0].val_dataloader()) == pytest.approx(
        min(point.new_loss for point in found.points), rel=1e-6
    )
    assert AutoTokenizer.from_pretrained("chosen").get_vocab() == chat_tokenizer().get_vocab()
    assert "<svg" in Path("picture.svg").read_text()


def test_the_command_ends_with_the_reason(base: Path, capsys: pytest.CaptureFixture[str]) -> None:
    chat_tokenizer().save_pretrained(base)
    data = ["--new=lightning_replay.TextDataModule", "--new.data=new.txt", f"--new.tokenizer={base}"]
    with pytest.raises(SystemExit, match="1"):
        main(["interpolate", f"--finetuned={base}", *data])
    assert "`base` is missing" in capsys.readouterr().err
