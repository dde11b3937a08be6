"""Every test leaves torch as it found it: what one switches for the whole process, another would feel."""

import pytest
import torch

pytest.register_assert_rewrite("attack_cases", "generated_cases", "model_cases")  # their assertions say what they saw


def settings() -> dict:
    """What torch keeps for the whole process and results depend on."""
    kernels = torch.backends.cuda
    return {
        "attention kernels": (
            kernels.flash_sdp_enabled(),
            kernels.mem_efficient_sdp_enabled(),
            kernels.math_sdp_enabled(),
        ),
        "matmul precision": torch.get_float32_matmul_precision(),
        "deterministic algorithms": torch.are_deterministic_algorithms_enabled(),
        "default dtype": torch.get_default_dtype(),
        "gradients": torch.is_grad_enabled(),
        "autocast": torch.is_autocast_enabled("cpu"),
    }


@pytest.fixture(autouse=True)
def unchanged_torch():
    found = settings()
    yield
    assert settings() == found
