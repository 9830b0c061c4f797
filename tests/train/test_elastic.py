"""Training at changing dials."""

import itertools
import json
import math

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from infmoe.checkpoint import resolve_checkpoint
from infmoe.errors import InfMoEError
from infmoe.hf import InfMoEConfig
from infmoe.layers import NoiseKey, PerLayer, Routing
from infmoe.train import elastic as elastic_module
from infmoe.train import loop, run
from infmoe.train.config import ElasticConfig, differing_keys, load_config
from infmoe.train.elastic import check_elastic, divergence, passes
from infmoe.train.session import Session


def weights(out):
    return load_file(resolve_checkpoint(out) / "model.safetensors")


def test_without_lists_a_step_is_one_pass_at_the_models_dials():
    (only,) = passes(ElasticConfig(), seed=3, step=5, num_layers=4)
    assert only.dials == {}
    assert (only.text, only.teaches, only.taught, only.other_noise) == (True, False, 0.0, False)


@pytest.mark.parametrize("per", ["layer", "step"])
def test_draws_are_uniform_and_a_function_of_seed_and_step(per):
    config = ElasticConfig(keep_ratio=(0.125, 0.25, 0.5), num_samples=(1, 3), per=per)
    seen = []
    for step in range(1500):
        (drawn,) = passes(config, seed=1, step=step, num_layers=4)
        assert drawn == passes(config, seed=1, step=step, num_layers=4)[0]
        ratio = drawn.dials["keep_ratio"]
        if per == "layer":
            assert isinstance(ratio, PerLayer)
            assert len(ratio.values) == 4
            seen += [*zip(ratio.values, drawn.dials["num_samples"].values, strict=True)]
        else:
            seen.append((ratio, drawn.dials["num_samples"]))
    for pair in itertools.product((0.125, 0.25, 0.5), (1, 3)):
        share = seen.count(pair) / len(seen)
        assert abs(share - 1 / 6) < 4.5 * math.sqrt(5 / 36 / len(seen)), pair
    other = [passes(config, seed=2, step=s, num_layers=4)[0].dials for s in range(20)]
    assert other != [passes(config, seed=1, step=s, num_layers=4)[0].dials for s in range(20)]


def test_layers_draw_for_themselves():
    config = ElasticConfig(num_experts_per_tok=tuple(range(1, 17)))
    drawn = [passes(config, seed=0, step=s, num_layers=2)[0].dials["num_experts_per_tok"].values for s in range(400)]
    first, second = zip(*drawn, strict=True)
    equal = sum(a == b for a, b in drawn)
    assert set(first) == set(second) == set(range(1, 17))
    assert 5 < equal < 55  # 400 / 16 expected


@pytest.mark.parametrize("distill", [False, True])
def test_a_sandwich_runs_the_largest_first_then_the_smallest_and_drawn_ones(distill):
    config = ElasticConfig(keep_ratio=(0.25, 0.5, 0.125), rule="sandwich", between=2, distill=distill)
    first, smallest, *drawn = passes(config, seed=0, step=0, num_layers=3)
    assert config.passes == 2 + len(drawn) == 4
    assert first.dials == {"keep_ratio": 0.5}
    assert smallest.dials == {"keep_ratio": 0.125}
    assert first.text
    assert (first.taught, first.teaches) == (0.0, distill)
    for other in (smallest, *drawn):
        assert (other.text, other.taught, other.teaches) == (not distill, float(distill), False)
        assert not other.other_noise  # the same noise: what a small ratio keeps, a large one keeps too


def test_consistency_draws_other_noise_at_the_same_dials():
    config = ElasticConfig(keep_ratio=(0.25, 0.5), consistency_weight=0.3)
    first, second = passes(config, seed=0, step=7, num_layers=3)
    assert config.passes == 2
    assert first.dials == second.dials
    assert (first.teaches, second.text, second.taught) == (True, True, 0.3)
    key = NoiseKey(seed=11, step=7, stream=torch.arange(2))
    keys = [p.routing(Routing(key=key)).key for p in (first, second)]
    assert keys[0] == key
    assert keys[1].seed != 11
    assert keys[1].step == 7


def test_divergence_is_kl_per_predicted_token():
    torch.manual_seed(0)
    teacher, student = torch.randn(2, 5, 7, requires_grad=True), torch.randn(2, 5, 7, requires_grad=True)
    found = divergence(teacher, student)
    p, q = teacher[:, :-1].softmax(-1), student[:, :-1].softmax(-1)
    torch.testing.assert_close(found, (p * (p / q).log()).sum(-1).mean())
    found.backward()
    assert teacher.grad is None
    torch.testing.assert_close(student.grad[:, :-1], ((q - p) / 8).detach())
    assert divergence(teacher, teacher).abs() < 1e-6


def test_divergence_makes_distributions_for_a_few_positions_at_a_time(monkeypatch):
    torch.manual_seed(1)
    teacher, student = torch.randn(3, 9, 50), torch.randn(3, 9, 50, requires_grad=True)
    target = teacher[:, :-1].reshape(-1, 50).log_softmax(-1)
    learnt = student[:, :-1].reshape(-1, 50).log_softmax(-1)
    expected = F.kl_div(learnt, target, log_target=True, reduction="batchmean")
    (gradient,) = torch.autograd.grad(expected, student)
    seen = []
    original = elastic_module._summed_divergence
    monkeypatch.setattr(
        elastic_module, "_summed_divergence", lambda *pair: seen.append(len(pair[0])) or original(*pair)
    )
    for entries in (49, 7 * 50, 10**6):
        seen.clear()
        monkeypatch.setattr(elastic_module, "_MAX_ENTRIES", entries)
        kept = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, kept=kept: kept.append(t) or t, lambda t: t):
            found = divergence(teacher, student)
        assert sum(seen) == 24
        assert max(seen) == max(1, min(24, entries // 50))
        torch.testing.assert_close(found, expected)
        inputs = {teacher.untyped_storage().data_ptr(), student.untyped_storage().data_ptr()}
        own = [t for t in kept if t.untyped_storage().data_ptr() not in inputs]
        assert sum(t.numel() for t in own if t.shape[-1:] == (50,)) <= 2 * 24 * 50  # the rows, and no distribution
        (again,) = torch.autograd.grad(found, student)
        torch.testing.assert_close(again, gradient)


def gradients(session, monkeypatch=None):
    loop.forward_backward(session, 3, with_stats=False)
    found = {name: p.grad.clone() for name, p in session.model.named_parameters() if p.grad is not None}
    session.optimizer.zero_grad(set_to_none=True)
    return found


@pytest.mark.parametrize(
    "elastic",
    [
        ("elastic.keep_ratio=[0.125,0.5]", "elastic.num_samples=[1,2]"),
        ("elastic.keep_ratio=[0.125,0.25,0.5]", "elastic.rule=sandwich", "elastic.between=1"),
        ("elastic.keep_ratio=[0.125,0.5]", "elastic.rule=sandwich", "elastic.distill=true"),
        (
            "elastic.keep_ratio=[0.125,0.5]",
            "elastic.rule=sandwich",
            "elastic.distill=true",
            "elastic.others_weight=0.3",
        ),
        ("elastic.consistency_weight=0.7",),
    ],
    ids=["draw", "sandwich", "distill", "weighted", "consistency"],
)
def test_gradients_are_those_of_the_rule_written_out(small, tmp_path, elastic):
    """Two micro-batches, so that accumulation is in it."""
    config = small("micro_batch_size=4", *elastic)
    session = Session.start(config, tmp_path / "run", resume=False)
    found = gradients(session)
    total = torch.zeros(())
    model, rule = session.model, config.elastic
    todo = passes(rule, seed=config.seed, step=3, num_layers=2)
    for micro in range(2):
        tokens, routing = session.micro_batch(3, micro, stats_tokens=1)

        def logits_of(this, tokens=tokens, routing=routing):
            return model(input_ids=tokens, routing=this.routing(routing)).logits

        def text(logits, tokens=tokens):
            return F.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())

        outputs = [logits_of(this) for this in todo]
        if rule.distill:
            parts = [text(outputs[0]), divergence(outputs[0], outputs[1])]
        else:
            parts = [text(logits) for logits in outputs]
            if rule.consistency_weight:
                parts[1] = parts[1] + 0.7 * divergence(outputs[0], outputs[1])
        weights = [1.0] + [rule.others_weight] * (len(parts) - 1)
        total = total + sum(w * part for w, part in zip(weights, parts, strict=True)) / sum(weights) / 2
    total.backward()
    expected = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert found.keys() == expected.keys()
    for name, grad in expected.items():
        torch.testing.assert_close(found[name], grad, rtol=2e-3, atol=2e-6, msg=name)


@pytest.mark.parametrize("start", [0.0, 0.7])
def test_a_resumed_elastic_run_is_the_uninterrupted_one(small, tmp_path, start):
    settings = ("elastic.keep_ratio=[0.125,0.25,0.5]", "elastic.rule=sandwich", "elastic.between=1")
    settings += (f"elastic.start={start}",)
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert run(small(*settings), whole).exit_code == 0
    stopped = small(*settings, "checkpoint.every=3")
    session = Session.start(stopped, cut, resume=False)
    lr = stopped.optim.lr
    for step in range(3):
        loop.set_lr(session.optimizer, lr * loop.lr_ratio(step, stopped.steps, stopped.schedule))
        loop.forward_backward(session, step, with_stats=False)
        session.accelerator.clip_grad_norm_(session.model.parameters(), stopped.optim.clip_norm)
        session.optimizer.step()
        session.optimizer.zero_grad(set_to_none=True)
    session.save(3)
    assert run(stopped, cut, resume=True).exit_code == 0
    a, b = weights(whole), weights(cut)
    assert all(torch.equal(a[name], b[name]) for name in a)
    plain = tmp_path / "plain"
    assert run(small(), plain).exit_code == 0
    assert any(not torch.equal(a[name], tensor) for name, tensor in weights(plain).items())


EMOE = ("model.ideal_experts_per_tok=4", "model.coactivation_prob=1.0", "model.hierarchical_loss_weight=0.5")


@pytest.mark.parametrize(
    ("variant", "rule", "num_passes"),
    [
        ("infinity", ("elastic.keep_ratio=[0.125,0.5]", "elastic.rule=sandwich", "elastic.distill=true"), 2),
        ("infinity", ("elastic.consistency_weight=1.0",), 2),
        ("moe", ("elastic.num_experts_per_tok=[1]",), 1),
        ("moe", EMOE, 1),
    ],
    ids=["sandwich", "consistency", "matryoshka", "emoe"],
)
def test_before_it_starts_a_run_trains_as_a_plain_one(small, tmp_path, variant, rule, num_passes):
    """By the gradients of the same step with the same weights, on either side of the start."""
    plain = Session.start(small("steps=10", variant=variant), tmp_path / "plain", resume=False)
    config = small("steps=10", "elastic.start=0.34", *rule, variant=variant)
    late = Session.start(config, tmp_path / "late", resume=False)
    assert (config.plain_steps, config.elastic.passes) == (3, num_passes)
    assert config.mean_passes == pytest.approx(1 + 0.7 * (num_passes - 1))

    def same(step):
        found = []
        for session in (plain, late):
            losses, _ = loop.forward_backward(session, step, with_stats=False)
            found.append([losses, *(p.grad.clone() for p in session.model.parameters() if p.grad is not None)])
            session.optimizer.zero_grad(set_to_none=True)
        return len(found[0]) == len(found[1]) and all(map(torch.equal, *found))

    assert [same(step) for step in (0, 2, 3, 9, 1)] == [True, True, False, False, True]


@pytest.mark.parametrize("variant", ["moe", "moe16-fine"])
def test_matryoshka_trains_at_the_drawn_numbers_of_experts(small, tmp_path, variant, monkeypatch):
    k = (1, 2, 3) if variant == "moe" else (1, 4, 16)
    config = small(f"elastic.num_experts_per_tok={list(k)}", variant=variant)
    session = Session.start(config, tmp_path / "run", resume=False)
    for step in range(4):
        (drawn,) = passes(config.elastic, seed=config.seed, step=step, num_layers=2)
        _, stats = loop.forward_backward(session, step, with_stats=True)
        assert stats is not None
        ran = [int(layer.counts_U.sum() / layer.tokens) for layer in stats]
        assert ran == list(drawn.dials["num_experts_per_tok"].values)


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"keep_ratio": []}, "at least one value"),
        ({"keep_ratio": [0.0]}, "elastic.keep_ratio"),
        ({"num_samples": [0]}, "elastic.num_samples"),
        ({"num_samples": [True, 2]}, "setting 'elastic.num_samples.0': input should be a valid integer, got True"),
        ({"num_samples": [2.0]}, "elastic.num_samples.0"),
        ({"num_experts_per_tok": ["2"]}, "elastic.num_experts_per_tok.0"),
        ({"keep_ratio": [True]}, "setting 'elastic.keep_ratio.0': input should be a valid number, got True"),
        ({"keep_ratio": 0.5}, r"'elastic.keep_ratio' takes a list in brackets, elastic.keep_ratio=\[...\], got 0.5"),
        ({"rule": "sandwich"}, "needs a list"),
        ({"keep_ratio": [0.5], "between": 1}, "go with elastic.rule=sandwich"),
        ({"keep_ratio": [0.5], "distill": True}, "go with elastic.rule=sandwich"),
        ({"keep_ratio": [0.5], "others_weight": 0.5}, "go with elastic.rule=sandwich"),
        ({"keep_ratio": [0.5, 0.25], "rule": "sandwich", "others_weight": 0}, "elastic.others_weight"),
        ({"keep_ratio": [0.5, 0.25], "rule": "sandwich", "consistency_weight": 1.0}, "goes with elastic.rule=draw"),
        ({"keep_ratio": [0.5], "rule": "sandwich"}, "at least two values"),
        ({"keep_ratio": [0.5, 0.25, 0.125], "rule": "sandwich"}, "set elastic.between=1"),
        ({"keep_ratio": [0.5, 0.25], "rule": "sandwich", "per": "step"}, "draws nothing in a sandwich"),
        ({"per": "step"}, "draws nothing without a list"),
        ({"start": 1.0}, "elastic.start"),
        ({"ratio": [0.5]}, "unknown setting"),
    ],
)
def test_bad_settings_are_one_line(small, settings, named):
    values = small().to_dict()
    with pytest.raises(InfMoEError, match=named):
        load_config(values | {"elastic": values["elastic"] | settings})


@pytest.mark.parametrize(("start", "at"), [(0.95, 6), (0.05, 0)])
def test_a_start_before_the_first_step_or_after_the_last_is_refused(small, start, at):
    with pytest.raises(InfMoEError, match=f"elastic.start={start} of 6 steps is step {at}: choose one between"):
        small("elastic.keep_ratio=[0.5]", f"elastic.start={start}")


def test_processes_begin_to_train_elastically_at_the_same_step(small, two_processes_train_as_one):
    """Elastic MoE's draws are a switch of the layer, below the processes' wrapper; two passes follow on one."""
    settings = (*EMOE, "elastic.num_experts_per_tok=[1,2]", "elastic.rule=sandwich", "elastic.start=0.5")
    config = small(*settings, "micro_batch_size=4", variant="moe")
    two_processes_train_as_one(config)


@pytest.mark.parametrize(
    ("model", "elastic", "named"),
    [
        ({"ffn": "dense"}, {"keep_ratio": (0.5,)}, "elastic.keep_ratio: DenseFFN has no dial"),
        ({"ffn": "moe"}, {"num_experts_per_tok": (1, 5)}, "5 is more than the layer's 4 experts"),
        ({"ffn": "moe"}, {"consistency_weight": 1.0}, "draws none"),
        ({"ffn": "infinity", "routing_mode": "mu"}, {"num_samples": (1, 2)}, "mu"),
        ({"ffn": "infinity", "sigma_activation": "none"}, {"consistency_weight": 1.0}, "draws none"),
        ({"ffn": "infinity"}, {"start": 0.5}, "elastic.start puts nothing off"),
        ({"ffn": "moe"}, {"start": 0.5}, "elastic.start puts nothing off"),
        (
            {"ffn": "moe", "ideal_experts_per_tok": 4},
            {"num_experts_per_tok": (1, 4)},
            "at 4, Elastic MoE draws nothing of the 4 best: give values below 4",
        ),
    ],
)
def test_dials_that_the_model_lacks_are_refused_before_anything_is_written(model, elastic, named):
    with pytest.raises(InfMoEError, match=named):
        check_elastic(ElasticConfig(**elastic), InfMoEConfig(hidden_size=8, num_attention_heads=2, **model))


def test_a_run_written_before_there_was_a_setting_has_its_default(small, tmp_path):
    config = small()
    old = json.loads(json.dumps(config.to_dict()))
    del old["elastic"]
    del old["optim"]["eps"]
    assert differing_keys(old, config.to_dict()) == []
    changed = small("elastic.keep_ratio=[0.5]", "optim.eps=1e-6").to_dict()
    assert differing_keys(old, changed) == ["elastic.keep_ratio", "optim.eps"]
