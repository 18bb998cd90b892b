"""What the calibrators read: each expert's own view for the geometry, the base's for the prototypes."""

import torch

from trainer.methods.alignx.head.calibrators import Fractal, Natural, no_signal, signal
from trainer.methods.alignx.head.dimension import bank_scale, distances, log_dimension

ROWS, VIEWS, LATENT = 60, 3, 6


def views(seed: int = 0) -> torch.Tensor:
    """Unit vectors, every view its own."""
    drawn_NVK = torch.randn(ROWS, VIEWS, LATENT, generator=torch.Generator().manual_seed(seed))
    return torch.nn.functional.normalize(drawn_NVK, dim=2)


labels_N = torch.arange(ROWS) % 2


def test_the_geometry_is_that_of_an_experts_own_view_of_its_own_prompts() -> None:
    f_NVK, f_BVK = views(), views(1)[:5]
    made = Fractal.of(f_NVK, labels_N, 2, 8, 0.05, 0.6)
    log_d_BA = torch.stack(
        [
            log_dimension(distances(f_BVK[:, 1 + a], bank_RK), bank_scale(bank_RK, 8), 0.05)
            for a in range(2)
            for bank_RK in [f_NVK[labels_N == a, 1 + a]]
        ],
        dim=1,
    )
    expected_BA = 0.6 * -(log_d_BA - log_d_BA.mean(1, keepdim=True))
    assert torch.allclose(made(f_BVK), expected_BA, atol=1e-5)
    assert torch.allclose(made(f_BVK).sum(1), torch.zeros(5), atol=1e-5)


def test_prototypes_are_the_bases_view_of_an_axis() -> None:
    f_NVK, f_BVK = views(), views(1)[:5]
    made = Natural.of(f_NVK, labels_N, 2, 0.4)
    for axis in range(2):
        prototype_K = f_NVK[labels_N == axis, 0].mean(0)
        expected_B = 0.4 * torch.cosine_similarity(f_BVK[:, 0], prototype_K[None], dim=1)
        assert torch.allclose(made(f_BVK)[:, axis], expected_B, atol=1e-6)


def test_a_shift_that_every_prompt_gets_is_no_signal() -> None:
    term_BA = torch.randn(20, 1, generator=torch.Generator().manual_seed(0)) + torch.tensor([[0.0, 1.0]])
    assert signal(term_BA) < 1e-6
    made = Natural.of(views(), labels_N, 2, 0.4)
    assert no_signal("natural", made, term_BA) == "the natural term is the same for every prompt"
    assert no_signal("natural", made, term_BA * torch.tensor([[1.0, -1.0]])) is None
    assert no_signal("natural", made, term_BA * float("nan")) == "the term is not finite on the bank"
