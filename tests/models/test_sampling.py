# SPDX-License-Identifier: Apache-2.0
"""How tokens are drawn from logits, and that eager, compiled and bfloat16 steps are the same model."""

import pytest
import torch

from wavedp.models import AutoregressiveConfig, AutoregressiveTransformer
from wavedp.models.generation import CompiledSteps, step
from wavedp.models.sampling import guided_logits, sample_tokens


def make(**changes: object) -> AutoregressiveTransformer:
    torch.manual_seed(0)
    sizes = {"num_classes": 3, "tokens_per_scale": 4, "num_scales": 2, "approximation_codes": 7, "detail_codes": 7}
    model = AutoregressiveTransformer(
        AutoregressiveConfig(**{**sizes, "width": 24, "depth": 1, "heads": 2, **changes})  # type: ignore[arg-type]
    ).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return model


def frequencies(logits: torch.Tensor, draws: int = 40_000, **options: object) -> torch.Tensor:
    uniforms = torch.rand(draws, generator=torch.Generator().manual_seed(0))
    drawn = sample_tokens(logits.expand(draws, -1), uniforms, **{"temperature": 1.0, **options})  # type: ignore[arg-type]
    return torch.bincount(drawn, minlength=logits.shape[-1]) / draws


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, [0.4, 0.05, 0.3, 0.25]),
        ({"temperature": 0.5}, [0.16 / 0.315, 0.0025 / 0.315, 0.09 / 0.315, 0.0625 / 0.315]),
        ({"top_k": 2}, [4 / 7, 0.0, 3 / 7, 0.0]),
        ({"top_k": 1}, [1.0, 0.0, 0.0, 0.0]),
        ({"top_p": 0.6}, [4 / 7, 0.0, 3 / 7, 0.0]),
        ({"top_p": 0.9}, [0.4 / 0.95, 0.0, 0.3 / 0.95, 0.25 / 0.95]),
        ({"top_p": 1e-6}, [1.0, 0.0, 0.0, 0.0]),
        ({"top_p": 1.0}, [0.4, 0.05, 0.3, 0.25]),
        ({"top_k": 3, "top_p": 0.5}, [4 / 7, 0.0, 3 / 7, 0.0]),  # of the three that are left, 0.42, 0.32 and 0.26
    ],
)
def test_tokens_are_as_frequent_as_their_probabilities(options: dict[str, object], expected: list[float]):
    got = frequencies(torch.tensor([0.4, 0.05, 0.3, 0.25]).log(), **options)
    torch.testing.assert_close(got, torch.tensor(expected), atol=0.012, rtol=0)  # 5 deviations
    assert torch.equal(got == 0, torch.tensor(expected) == 0)


def test_the_ends_of_the_uniform_numbers_are_tokens_that_can_be_drawn():
    logits = torch.tensor([float("-inf"), 0.0, 0.0, float("-inf")]).expand(2, -1)
    ends = torch.tensor([0.0, 1 - 2**-24])
    assert sample_tokens(logits, ends, 1.0).tolist() == [1, 2]
    assert sample_tokens(logits * 3, None, 1.0).tolist() == [1, 1]


def test_guided_logits_go_from_none_through_given():
    logits = torch.tensor([[2.0, 0.0], [1.0, 1.0]])
    assert guided_logits(logits, 3.0).tolist() == [[4.0, -2.0]]


@pytest.mark.parametrize("position", ["learned", "factorised", "rotary"])
@pytest.mark.parametrize("text_length", [0, 3])
def test_steps_give_the_logits_of_a_full_pass(position: str, text_length: int):
    """By greedy tokens over caches that grow twice, with and without guidance."""
    changes = {"text_length": text_length, "text_width": 5 if text_length else 0, "per_scale_heads": True}
    model = make(position=position, num_scales=3, tokens_per_scale=9, **changes)
    labels = torch.tensor([0, 1, 2, 3])
    text = torch.randn(4, 2, 5) if text_length else None
    mask = torch.tensor([[True, True], [True, False], [False, False], [True, True]]) if text_length else None
    for scale in (1.0, 2.0):
        tokens = model.generate(labels, temperature=0, guidance_scale=scale, text=text, text_mask=mask)
        hidden = model.hidden(labels, tokens[:, :-1], text, mask)
        none = model.hidden(torch.full_like(labels, model.no_class), tokens[:, :-1])
        for t in range(27):
            logits = guided_logits(torch.cat([model.head(t)(hidden[:, t]), model.head(t)(none[:, t])]), scale)
            chosen = logits.gather(1, tokens[:, t : t + 1])[:, 0]
            torch.testing.assert_close(chosen, logits.amax(1), rtol=1e-4, atol=1e-4)
        assert len(tokens.unique()) > 3


def test_text_and_its_absence_change_what_is_drawn():
    model = make(text_length=3, text_width=5)
    labels, text = torch.zeros(6, dtype=torch.int64), torch.randn(6, 3, 5)
    with_text = model.generate(labels, temperature=0, text=text)
    without = model.generate(labels, temperature=0)
    assert not torch.equal(with_text, without)
    hidden = torch.zeros(6, 3, dtype=torch.bool)
    assert torch.equal(model.generate(labels, temperature=0, text=text, text_mask=hidden), without)
    padded = torch.cat([text[:, :2], torch.zeros(6, 1, 5)], 1)
    mask = torch.tensor([[True, True, False]]).expand(6, -1)
    assert torch.equal(
        model.generate(labels, temperature=0, text=padded, text_mask=mask),
        model.generate(labels, temperature=0, text=text[:, :2]),
    )


def test_bfloat16_steps_are_close():
    """Greedy tokens are among the likeliest: bfloat16 has 8 bits, and a margin within their error may go either way."""
    model = make(num_scales=3)
    labels = torch.arange(3).repeat(8)
    tokens = model.generate(labels, temperature=0, dtype=torch.bfloat16)
    hidden = model.hidden(labels, tokens[:, :-1])
    for t in range(model.config.length):
        logits = model.head(t)(hidden[:, t])
        gap = logits.amax(1) - logits.gather(1, tokens[:, t : t + 1])[:, 0]
        assert gap.max() < 0.05 * logits.std(), t


def test_no_labels_no_tokens():
    assert make().generate(torch.empty(0, dtype=torch.int64)).shape == (0, 8)


def test_compiled_steps_draw_the_same_tokens(monkeypatch: pytest.MonkeyPatch):
    """One graph serves both scales, whose codebooks have one size here; new weights are seen by it.

    Without inductor, whose compiler takes longer than all tests of this file; the benchmark checks that.
    """
    torch.compiler.reset()
    graph = torch.compile(step, backend="aot_eager", fullgraph=True, dynamic=False)
    monkeypatch.setitem(CompiledSteps.functions, "cpu", graph)
    model = make(position="rotary")
    labels = torch.arange(3)

    def draw(compiled: bool) -> torch.Tensor:
        generator = torch.Generator().manual_seed(4)
        return model.generate(labels, generator=generator, guidance_scale=1.5, compiled=compiled)

    before = draw(True)
    assert torch.equal(before, draw(False))
    held = CompiledSteps.kept[model][1]
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(-0.7)
    after = draw(True)
    assert CompiledSteps.kept[model][1] is held
    assert torch.equal(after, draw(False))
    assert not torch.equal(after, before)
