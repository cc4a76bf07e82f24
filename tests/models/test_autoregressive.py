# SPDX-License-Identifier: Apache-2.0
"""The autoregressive model: causality, cache, sampling rules, guidance, per-sample losses."""

import math
from dataclasses import replace

import pytest
import torch

from wavedp.errors import InvalidTypeError, InvalidValueError
from wavedp.models import AutoregressiveConfig, AutoregressiveTransformer
from wavedp.models.lora import add_lora, merge_lora


def make(seed: int = 0, **changes: object) -> AutoregressiveTransformer:
    torch.manual_seed(seed)
    sizes = {"num_classes": 3, "tokens_per_scale": 4, "num_scales": 3, "approximation_codes": 10, "detail_codes": 7}
    config = AutoregressiveConfig(**{**sizes, "width": 16, "depth": 2, "heads": 2, **changes})
    model = AutoregressiveTransformer(config).eval()
    for parameter in model.parameters():  # far from the near-uniform start, so that differences show
        torch.nn.init.normal_(parameter, std=0.5)
    return model


def tokens_for(model: AutoregressiveTransformer, batch: int) -> torch.Tensor:
    c = model.config
    rest = torch.randint(c.detail_codes, (batch, c.length - c.tokens_per_scale))
    return torch.cat([torch.randint(c.approximation_codes, (batch, c.tokens_per_scale)), rest], dim=1)


def test_the_loss_is_one_number_a_sample_and_independent_of_the_others():
    model = make()
    tokens, labels = tokens_for(model, 5), torch.tensor([0, 1, 2, 0, 3])
    losses = model.loss(tokens, labels)
    assert losses.shape == (5,)
    alone = torch.cat([model.loss(tokens[i : i + 1], labels[i : i + 1]) for i in range(5)])
    torch.testing.assert_close(losses, alone)


def test_a_prefix_of_the_scales_costs_the_mean_over_its_own_tokens():
    model = make()
    tokens, labels = tokens_for(model, 2), torch.tensor([0, 1])
    changed = tokens.clone()
    changed[:, 4:] = 0
    torch.testing.assert_close(model.loss(changed[:, :4], labels), model.loss(tokens[:, :4], labels))


def test_sampling_follows_the_distribution_that_the_loss_scores():
    """Total probability of all 2-token sequences is one, and greedy decoding finds the likeliest next token."""
    model = make(tokens_per_scale=2, num_scales=1, approximation_codes=5)
    pairs = torch.cartesian_prod(torch.arange(5), torch.arange(5))
    log_p = -2 * model.loss(pairs, torch.ones(25, dtype=torch.int64))
    torch.testing.assert_close(log_p.exp().sum(), torch.tensor(1.0))
    drawn = model.generate(torch.ones(20_000, dtype=torch.int64), generator=torch.Generator().manual_seed(0))
    counts = torch.bincount(drawn[:, 0] * 5 + drawn[:, 1], minlength=25)
    expected = 20_000 * log_p.exp()
    kept = expected > 5
    chi2 = ((counts - expected).square() / expected)[kept].sum().item()
    freedom = int(kept.sum()) - 1
    assert chi2 < freedom + 6 * math.sqrt(2 * freedom) + 20  # far outside chance; the seed is fixed anyway


def test_the_cache_gives_what_a_full_pass_gives():
    model = make()
    labels = torch.tensor([0, 1, 2])
    generated = model.generate(labels, temperature=0)
    hidden = model.hidden(labels, generated[:, :-1])
    for t in range(model.config.length):  # teacher-forced argmax at every position
        assert torch.equal(generated[:, t], model.head(t)(hidden[:, t]).argmax(-1)), t


def test_every_device_gives_the_same_losses_and_greedy_tokens(device: torch.device):
    model = make()
    tokens, labels = tokens_for(model, 5), torch.tensor([0, 1, 2, 0, 3])
    losses, greedy = model.loss(tokens, labels), model.generate(labels, temperature=0)
    model.to(device)
    got = model.loss(tokens.to(device), labels.to(device)).cpu()
    torch.testing.assert_close(got, losses, rtol=1e-4, atol=1e-4)
    assert torch.equal(model.generate(labels.to(device), temperature=0).cpu(), greedy)


def test_a_token_never_sees_the_future():
    model = make()
    tokens, labels = tokens_for(model, 1), torch.tensor([1])
    before = model._embed(labels, tokens[:, :-1])
    changed = tokens.clone()
    changed[0, 6] = (changed[0, 6] + 1) % 7
    after = model._embed(labels, changed[:, :-1])
    for block in model.blocks:
        before, after = block(before), block(after)
    torch.testing.assert_close(before[:, :7], after[:, :7])
    assert not torch.allclose(before[:, 7], after[:, 7])


def test_a_generator_makes_sampling_repeatable():
    model = make()
    labels = torch.arange(3)
    first = model.generate(labels, generator=torch.Generator().manual_seed(3))
    second = model.generate(labels, generator=torch.Generator().manual_seed(3))
    third = model.generate(labels, generator=torch.Generator().manual_seed(4))
    assert torch.equal(first, second)
    assert not torch.equal(first, third)


def test_partial_generation_is_the_prefix_of_the_whole():
    model = make()
    labels = torch.arange(3)
    whole = model.generate(labels, temperature=0)
    assert torch.equal(model.generate(labels, num_scales=1, temperature=0), whole[:, :4])


def test_guidance_moves_the_logits_along_the_class_direction():
    model = make()
    labels = torch.tensor([0, 1, 2])
    without_class = torch.full_like(labels, model.no_class)

    def first_logits(rows: torch.Tensor) -> torch.Tensor:
        hidden = (model.class_embedding(rows) + model.position_embedding.weight[0])[:, None]
        for block in model.blocks:
            hidden = block(hidden)
        return model.approximation_head(model.norm(hidden[:, 0]))

    guided = first_logits(without_class) + 3.0 * (first_logits(labels) - first_logits(without_class))
    got = model.generate(labels, num_scales=1, temperature=0, guidance_scale=3.0)[:, 0]
    assert torch.equal(got, guided.argmax(-1))
    assert torch.equal(
        model.generate(labels, temperature=0, guidance_scale=0.0), model.generate(without_class, temperature=0)
    )


def test_class_dropout_hides_the_class_in_training_only():
    model = make(class_dropout=0.5)
    tokens, labels = tokens_for(model, 1).repeat(2000, 1), torch.zeros(2000, dtype=torch.int64)
    without = model.loss(tokens[:1], torch.tensor([model.no_class]))
    torch.manual_seed(0)
    hidden = torch.isclose(model.train().loss(tokens, labels), without).float().mean().item()
    assert abs(hidden - 0.5) < 0.05
    assert model.eval().loss(tokens, labels).std() < 1e-5


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"labels": torch.tensor([4])}, r"0\.\.2"),
        ({"labels": torch.tensor([-1])}, r"0\.\.2"),
        ({"labels": torch.tensor([0.0])}, "int64"),
        ({"num_scales": 4}, "num_scales"),
        ({"temperature": -1.0}, "temperature"),
        ({"top_k": 0}, "top_k"),
        ({"top_p": 0.0}, "top_p"),
        ({"guidance_scale": math.inf}, "guidance_scale"),
        ({"dtype": torch.int64}, "dtype"),
        ({"text": torch.zeros(1, 2, 3)}, "takes no text"),
        ({"text_mask": torch.ones(1, 2, dtype=torch.bool)}, "without text"),
    ],
)
def test_bad_sampling_arguments_are_refused(arguments: dict[str, object], message: str):
    with pytest.raises(ValueError, match=message):
        make().generate(**{"labels": torch.tensor([0]), **arguments})


def test_bad_training_batches_are_refused():
    model = make()
    with pytest.raises(ValueError, match=r"k \* 4"):
        model.loss(torch.zeros(1, 5, dtype=torch.int64), torch.tensor([0]))
    with pytest.raises(ValueError, match="2 token sequences but 1 labels"):
        model.loss(torch.zeros(2, 4, dtype=torch.int64), torch.tensor([0]))


def test_other_classes_begin_as_no_class():
    model = make(class_names=("a", "b", "c"))
    other = model.with_classes(["x", "y"])
    assert other.config == replace(model.config, num_classes=2, class_names=("x", "y"))
    assert other.no_class == 2
    assert not other.training
    tokens = tokens_for(model, 4)
    expected = model.loss(tokens, torch.full((4,), model.no_class))
    for label in (0, 1, 2):
        assert torch.equal(other.loss(tokens, torch.full((4,), label)), expected)
    before = model.class_embedding.weight.detach().clone()
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.zero_()
    assert torch.equal(model.class_embedding.weight, before)  # a copy
    assert model.config.class_names == ("a", "b", "c")
    assert model.class_embedding.num_embeddings == 4


@pytest.mark.parametrize("position", ["learned", "rotary"])
def test_other_classes_leave_all_else_as_it_is(position):
    """Adapters, what is frozen, dtypes and modes of parts, and torch's random state."""
    model = make(position=position, width=24)
    add_lora(model, 2)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    model.norm.weight.requires_grad_(True)
    model.approximation_head.double().train()
    state = torch.get_rng_state()
    other = model.with_classes(["x", "y"])
    assert torch.equal(torch.get_rng_state(), state)
    kept, copied = dict(model.named_parameters()), dict(other.named_parameters())
    assert [*kept] == [*copied]
    for name, parameter in kept.items():
        assert copied[name].requires_grad == parameter.requires_grad, name
        assert copied[name].dtype == parameter.dtype, name
        assert copied[name].data_ptr() != parameter.data_ptr(), name
        rows = [3, 3, 3] if name == "class_embedding.weight" else slice(None)
        assert torch.equal(copied[name], parameter[rows]), name
    assert [module.training for module in other.modules()] == [module.training for module in model.modules()]
    assert other.approximation_head.training
    merged = model.with_classes(["x"])
    merge_lora(merged)
    for part in (model, merged):
        part.float()
    tokens = tokens_for(model, 4)
    expected = model.loss(tokens, torch.full((4,), model.no_class))
    torch.testing.assert_close(merged.loss(tokens, torch.zeros(4, dtype=torch.int64)), expected)
    for trained in (True, False):
        model.class_embedding.requires_grad_(trained)
        assert model.with_classes(["x"]).class_embedding.weight.requires_grad == trained


@pytest.mark.parametrize(
    ("names", "error", "message"),
    [
        ([], InvalidValueError, r"at least one, got \[\]"),
        (["x", "x"], InvalidValueError, "must be distinct"),
        ([""], InvalidValueError, "none of them empty"),
        (["a", " ", "b"], InvalidValueError, "none of them empty"),
        ("abc", InvalidTypeError, r"a sequence of texts, such as \['cat', 'dog'\], got 'abc'"),
        (None, InvalidTypeError, "a sequence of texts"),
        ([[1]], InvalidTypeError, "a sequence of texts"),
        (b"abc", InvalidTypeError, "a sequence of texts"),
    ],
)
def test_what_are_no_class_names_is_refused(names, error, message):
    with pytest.raises(error, match=message):
        make().with_classes(names)
