"""BadNets, Blend and WaNet: what each trigger does to an image."""

import numpy as np
import PIL.Image
import pytest
from attack_cases import SHAPES, attack_of, every_attack, every_shape, image_of

from hf_fip.attacks import BadNets, Blend, WaNet, make_attack


@every_attack
@every_shape
def test_equal_options_make_equal_triggers_that_change_the_image(case, shape):
    image = image_of(shape)
    before = image.copy()
    first, second = attack_of(case), attack_of(case)
    second.apply(image_of((40, 40, 3)))  # what was triggered before must not matter
    triggered = first.apply(image)
    assert (triggered.shape, triggered.dtype) == (image.shape, np.uint8)
    np.testing.assert_array_equal(triggered, second.apply(image))
    np.testing.assert_array_equal(image, before)
    assert (triggered != image).any()


@pytest.mark.parametrize("name", ["blend", "wanet"])
def test_another_seed_makes_another_random_trigger(name):
    image = image_of((32, 32, 3))
    assert (make_attack(name, seed=1).apply(image) != make_attack(name, seed=2).apply(image)).any()


@every_shape
@pytest.mark.parametrize("alpha, side", [(1.0, 3), (0.6, 3), (1.0, 7)])
def test_badnets_blends_the_checker_into_the_bottom_right_corner_only(shape, alpha, side):
    image = image_of(shape)
    triggered = BadNets(alpha=alpha, patch_size=side).apply(image)
    checker = [[0, 0, 255], [0, 255, 0], [255, 0, 255]]
    expected = image.astype(float)
    for i in range(side):
        for j in range(side):
            row, column = shape[0] - side + i, shape[1] - side + j
            expected[row, column] = (1 - alpha) * expected[row, column] + alpha * checker[i % 3][j % 3]
    np.testing.assert_allclose(triggered, expected, atol=0.5, rtol=0)
    outside = np.ones(shape[:2], dtype=bool)
    outside[-side:, -side:] = False
    np.testing.assert_array_equal(triggered[outside], image[outside])


@every_shape
def test_blend_mixes_one_gaussian_image_into_every_pixel(shape):
    image, attack = image_of(shape), Blend(alpha=0.2)
    noise = attack.tensors["noise"]
    repeated = np.tile(noise, (2, 2, 1))[: shape[0], : shape[1], : shape[2]]
    np.testing.assert_allclose(attack.apply(image), 0.8 * image + 0.2 * repeated, atol=0.5 + 1e-9, rtol=0)
    # N(127.5, 64²) clipped at ±2σ: mean 127.5, standard deviation 0.96 · 64, and 2.3 % at either end
    assert noise.mean() == pytest.approx(127.5, abs=0.5)
    assert noise.std() == pytest.approx(61.3, abs=0.5)
    assert (noise == 0).mean() == pytest.approx(0.023, abs=0.003)


def bicubic_matrix(size: int, points: int) -> np.ndarray:
    """size×points: Keys' cubic convolution (a = −0.75), end points aligned, edge values repeated."""
    matrix, a = np.zeros((size, points)), -0.75
    for i in range(size):
        where = i * (points - 1) / max(size - 1, 1)
        for j in range(int(where) - 1, int(where) + 3):
            d = abs(where - j)
            near, far = (a + 2) * d**3 - (a + 3) * d**2 + 1, a * (d**3 - 5 * d**2 + 8 * d - 4)
            matrix[i, min(max(j, 0), points - 1)] += near if d <= 1 else far if d < 2 else 0
    return matrix


def read_bilinear(image: np.ndarray, x: float, y: float) -> np.ndarray:
    """The image at column x and row y, in pixels inside the image."""
    height, width, _ = image.shape
    left, top = int(x), int(y)
    right, bottom = min(left + 1, width - 1), min(top + 1, height - 1)
    pixel, u, v = image.astype(float), x - left, y - top
    upper = (1 - u) * pixel[top, left] + u * pixel[top, right]
    lower = (1 - u) * pixel[bottom, left] + u * pixel[bottom, right]
    return (1 - v) * upper + v * lower


def warped(image: np.ndarray, attack: WaNet, jitter: np.ndarray | float = 0.0) -> np.ndarray:
    """WaNet pixel by pixel, not rounded. `jitter`, H×W×2 in x and y, is in units of 1 / side."""
    height, width, _ = image.shape
    field = attack.tensors["field"].astype(float)
    down, across = bicubic_matrix(height, attack.grid_size), bicubic_matrix(width, attack.grid_size)
    jitter = np.broadcast_to(jitter, (height, width, 2))
    result = np.zeros(image.shape)
    for i in range(height):
        for j in range(width):
            position = []
            for axis, (index, side) in enumerate([(j, width), (i, height)]):
                point = 2 * index / (side - 1) - 1 + attack.strength * (down[i] @ field[axis] @ across[j]) / side
                point = min(max(point, -1), 1)
                point = min(max(point + jitter[i, j, axis] / side, -1), 1)
                position.append((point + 1) / 2 * (side - 1))
            result[i, j] = read_bilinear(image, *position)
    return result


@pytest.mark.parametrize("case", ["wanet", "wanet-strong"])
@pytest.mark.parametrize("shape", SHAPES[:4], ids=str)
def test_wanet_is_a_bilinear_warp_by_a_bicubic_field(case, shape):
    image, attack = image_of(shape), attack_of(case)
    assert np.abs(attack.tensors["field"]).mean() == pytest.approx(1, abs=1e-5)
    # The whole difference is rounding: half a gray level.
    np.testing.assert_allclose(attack.apply(image), warped(image, attack), atol=0.5 + 5e-3, rtol=0)


@pytest.mark.parametrize("shape", SHAPES[:4], ids=str)
def test_wanet_covers_are_the_warp_with_a_jitter_drawn_for_each_image(shape):
    image, attack = image_of(shape), WaNet()
    cover = attack.apply_cover(image, np.random.default_rng(5))
    jitter = np.random.default_rng(5).uniform(-1, 1, (*shape[:2], 2))
    np.testing.assert_allclose(cover, warped(image, attack, jitter), atol=0.5 + 5e-3, rtol=0)
    assert (cover != attack.apply(image)).any()
    assert (cover != attack.apply_cover(image, np.random.default_rng(6))).any()


@pytest.mark.parametrize("value", [0, 255])
def test_a_warp_leaves_flat_images_as_they_are(value):
    image = np.full((20, 30, 3), value, dtype=np.uint8)
    np.testing.assert_array_equal(WaNet(strength=5.0).apply(image), image)


def test_an_attack_without_covers_says_so():
    with pytest.raises(NotImplementedError, match="badnets has no covers"):
        BadNets().apply_cover(image_of((8, 8, 3)), np.random.default_rng(0))


@pytest.mark.parametrize(
    "image",
    [image_of((8, 8, 3)) / 255, image_of((8, 8, 4)), image_of((8, 8)), PIL.Image.new("RGB", (8, 8))],
    ids=["float", "RGBA", "no channel axis", "PIL"],
)
def test_other_than_uint8_gray_or_rgb_arrays_are_refused(image):
    with pytest.raises(ValueError, match="uint8 array of shape"):
        Blend().apply(image)
