"""Loss and gradients of the chunked head, against plain logits and cross-entropy in float64."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode, addmm_flop

from shared.head import Float32Head, LogitTransform
from shared.statistics import token_statistics
from stage2_train.weighted_head import weighted_cross_entropy

V, D = 97, 16
PLAIN = LogitTransform()
TRANSFORMS = {"plain": PLAIN, "scaled": LogitTransform(0.25), "capped": LogitTransform(1.5, 5.0)}


def make_head(dtype: torch.dtype, bias: bool = False) -> Float32Head:
    torch.manual_seed(0)
    head = Float32Head(D, V, bias=bias)
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.copy_(torch.randn(parameter.shape))
    return head.to(dtype)


def inputs(num: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(num)
    weights_N = torch.rand(num) * (torch.rand(num) > 0.3)
    return torch.randn(num, D).to(dtype), torch.randint(0, V, (num,)), weights_N


def given(weights_N: Tensor):
    return lambda logits, part: weights_N[part]


def reference(head: Float32Head, hidden: Tensor, targets: Tensor, weights: Tensor, transform: LogitTransform):
    """Loss, nll and gradients (hidden, weight, bias) in float64, from all logits at once."""
    leaves = [hidden.double(), *(parameter.double() for parameter in head.parameters())]
    leaves = [leaf.detach().requires_grad_() for leaf in leaves]
    logits = F.linear(*leaves) * transform.factor
    if transform.cap:
        logits = transform.cap * torch.tanh(logits / transform.cap)
    nll = F.cross_entropy(logits, targets, reduction="none")
    loss = (weights.double() * nll).sum()
    return loss, nll, torch.autograd.grad(loss, leaves)


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("num", [0, 1, 7, 40])
@pytest.mark.parametrize("chunk", [1, 3, 8, 1000])
def test_loss_and_gradients_are_exact_under_outer_scaling(chunk: int, num: int, bias: bool, transform: str):
    """N divisible by the chunk and not, one chunk and many, none at all; the loss scaled outside."""
    head, (hidden, targets, weights) = make_head(torch.float64, bias), inputs(num, torch.float64)
    hidden.requires_grad_()
    total, nll, seen = weighted_cross_entropy(
        head, hidden, targets, given(weights), TRANSFORMS[transform], chunk * V * 8
    )
    (total * -2.5).backward()
    loss, expected_nll, gradients = reference(head, hidden, targets, weights, TRANSFORMS[transform])
    torch.testing.assert_close(total.detach(), loss.detach(), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(nll, expected_nll.detach(), rtol=1e-12, atol=1e-12)
    assert torch.equal(seen, weights)
    for found, expected in zip([hidden.grad, *(p.grad for p in head.parameters())], gradients, strict=True):
        torch.testing.assert_close(found, -2.5 * expected, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("denominator", [4000, 4080, 3900])
@pytest.mark.parametrize("num_chunks", [1, 5])
def test_bfloat16_is_accumulated_in_float32(num_chunks: int, denominator: int):
    """The products of bfloat16 operands are exact in float32; what is rounded is each gradient once, and d logits.

    1 / 4080 and 1 / 3900 lie between two bfloat16 numbers: rounded to one, they would scale all gradients by 0.4 %.
    """
    head, (hidden, targets, weights) = make_head(torch.bfloat16), inputs(4000, torch.bfloat16)
    hidden.requires_grad_()
    chunk = (len(targets) // num_chunks) * V * 4
    scale = 1 / denominator
    total, nll, _ = weighted_cross_entropy(head, hidden, targets, given(weights), PLAIN, chunk, scale)
    total.backward()
    assert total.dtype == nll.dtype == torch.float32
    loss, expected_nll, gradients = reference(head, hidden, targets, weights, PLAIN)
    torch.testing.assert_close(nll.double(), expected_nll.detach(), rtol=1e-5, atol=1e-5)
    assert total.item() == pytest.approx(loss.item() * scale, rel=1e-5)
    for found, expected in zip((hidden.grad, head.weight.grad), gradients, strict=True):
        assert found.dtype == torch.bfloat16
        error = (found.double() / scale - expected).norm() / expected.norm()
        assert error < 2**-8
        common = float((found.double() / scale * expected).sum() / expected.square().sum())
        assert common == pytest.approx(1, abs=5e-4), "all gradients are off alike"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_extreme_logits_stay_finite(dtype: torch.dtype):
    """A target hundreds of nats below the maximum, and one whose probability rounds to 1."""
    head = make_head(dtype)
    with torch.no_grad():
        head.weight.zero_()
        head.weight[3, 0], head.weight[5, 0] = 400.0, -400.0
    hidden = torch.zeros(2, D, dtype=dtype)
    hidden[:, 0] = 1.0
    hidden.requires_grad_()
    total, nll, _ = weighted_cross_entropy(head, hidden, torch.tensor([5, 3]), given(torch.ones(2)), PLAIN, 1 << 20)
    total.backward()
    torch.testing.assert_close(nll, torch.tensor([800.0, 0.0]))
    for gradient in (hidden.grad, head.weight.grad):
        assert gradient is not None
        assert gradient.isfinite().all()


def test_online_weights_are_made_of_the_same_logits():
    """Chunk by chunk as from all logits at once, and detached."""
    head, (hidden, targets, _) = make_head(torch.float32), inputs(23, torch.float32)
    columns = ("logprob", "mass_rank", "entropy", "entropy_top20", "collision")
    seen = []

    def weigh(logits: Tensor, part: slice) -> Tensor:
        statistics = token_statistics(logits, targets[part], columns)
        seen.append(statistics)
        return statistics["logprob"].exp()

    hidden.requires_grad_()
    total, nll, weights = weighted_cross_entropy(head, hidden, targets, weigh, PLAIN, 5 * V * 4)
    expected = token_statistics(hidden.detach() @ head.weight.detach().t(), targets, columns)
    for column in columns:
        torch.testing.assert_close(torch.cat([part[column] for part in seen]), expected[column])
    torch.testing.assert_close(weights, expected["logprob"].exp())
    torch.testing.assert_close(nll, -expected["logprob"])
    total.backward()
    gradients = reference(head, hidden, targets, weights, PLAIN)[2]
    torch.testing.assert_close(hidden.grad.double(), gradients[0], rtol=1e-4, atol=1e-5)


def test_no_logits_of_all_targets(monkeypatch: pytest.MonkeyPatch):
    """No product is larger than the bound, unless it is a single row."""
    from stage2_train import weighted_head

    sizes = []

    def product(rows: Tensor, weight: Tensor) -> Tensor:
        sizes.append(len(rows) * len(weight) * 4)
        return rows @ weight.t()

    monkeypatch.setattr(weighted_head, "float32_product", product)
    head, (hidden, targets, weights) = make_head(torch.float32), inputs(50, torch.float32)
    for bound in (1, 7 * V * 4 + 3):
        sizes.clear()
        weighted_cross_entropy(head, hidden, targets, given(weights), PLAIN, bound)
        assert max(sizes) == max(V * 4, bound // (V * 4) * V * 4)


def test_a_second_backward_pass_is_refused():
    """It would scale gradients that are scaled already."""
    head, (hidden, targets, weights) = make_head(torch.float32), inputs(5, torch.float32)
    total, _, _ = weighted_cross_entropy(head, hidden.requires_grad_(), targets, given(weights), PLAIN, 1 << 20)
    total.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        total.backward()


def test_without_gradients_none_are_made():
    head, (hidden, targets, weights) = make_head(torch.float32), inputs(5, torch.float32)
    head.requires_grad_(False)
    total, nll, _ = weighted_cross_entropy(head, hidden, targets, given(weights), PLAIN, 1 << 20)
    assert not total.requires_grad
    torch.testing.assert_close(nll, F.cross_entropy(hidden @ head.weight.t(), targets, reduction="none"))
    frozen_head, _, _ = weighted_cross_entropy(head, hidden.requires_grad_(), targets, given(weights), PLAIN, 1 << 20)
    frozen_head.backward()
    assert hidden.grad is not None
    assert head.weight.grad is None


def test_where_gradients_are_switched_off_a_head_in_training_has_none_worked_out():
    """As for targets that are only watched, and in evaluations: one product of three."""
    head, (hidden, targets, weights) = make_head(torch.float32), inputs(50, torch.float32)
    hidden.requires_grad_()
    with FlopCounterMode(display=False, custom_mapping={torch.ops.aten.addmm_: addmm_flop}) as counter, torch.no_grad():
        weighted_cross_entropy(head, hidden, targets, given(weights), PLAIN, 7 * V * 4)
    assert counter.get_total_flops() == 2 * 50 * V * D


def added_product(_: torch.Size, left: torch.Size, right: torch.Size, **__: object) -> int:
    return 2 * left[0] * left[1] * right[1]


def test_a_frozen_head_takes_two_products_of_three():
    """What LoRA leaves as it is has no gradient, and none is worked out."""
    counts = {}
    for frozen in (False, True):
        head, (hidden, targets, weights) = make_head(torch.float32), inputs(50, torch.float32)
        head.requires_grad_(not frozen)
        hidden.requires_grad_()
        with FlopCounterMode(display=False, custom_mapping={torch.ops.aten.addmm_: added_product}) as counter:
            total, _, _ = weighted_cross_entropy(head, hidden, targets, given(weights), PLAIN, 7 * V * 4)
            total.backward()
        counts[frozen] = counter.get_total_flops()
    assert counts == {False: 3 * 2 * 50 * V * D, True: 2 * 2 * 50 * V * D}
