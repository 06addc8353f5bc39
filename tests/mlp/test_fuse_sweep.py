"""fuse changes nothing but the time: generated models before and after, whatever their forwards do."""

import pytest
import torch
from fusemlp import fuse, fuse_report, unfuse
from fusemlp.kernels import launch
from generated import SEEN, WIDTH, build, recipes
from hypothesis import given, settings

# Said of backward hooks, before fuse and after.
pytestmark = pytest.mark.filterwarnings("ignore:Full backward hook is firing")
INPLACE = pytest.mark.parametrize("inplace", [True, False], ids=["in place", "copied"])


def state(value):
    """A copy of what can be compared of a value."""
    if isinstance(value, torch.Tensor):
        return value.detach().clone()
    if isinstance(value, list | tuple):
        return [state(each) for each in value]
    return value if isinstance(value, int | float | str | None) else type(value).__name__


def attributes(module):
    """All attributes of a module and the modules below it, without parameters and buffers."""
    others = "_parameters", "_modules", "_buffers"
    return [
        (name, [(key, state(value)) for key, value in vars(each).items() if key not in others])
        for name, each in module.named_modules(remove_duplicate=False)
    ]


def used(module, x):
    """What two training steps and an evaluation return, raise, and leave behind."""
    SEEN.clear()
    torch.manual_seed(1)
    found = []
    for training, flag, grad in [(True, True, True), (False, True, False), (True, False, True)]:
        module.train(training)
        module.flag = flag
        module.zero_grad()
        leaf = x.clone().requires_grad_()
        given = leaf * 1  # what is computed in place shows here
        with torch.set_grad_enabled(grad):
            try:
                y = module(given)
                if y.requires_grad:
                    y.square().sum().backward()
                found += [y, y.requires_grad]
            except RuntimeError:
                found.append("RuntimeError")
        found += [given, leaf.grad, *(p.grad for p in module.parameters()), *module.buffers()]
        found += [torch.is_grad_enabled(), torch.get_rng_state(), attributes(module), SEEN]
        found = state(found)
    return found


def assert_same(found, expected, **tolerance):
    if isinstance(expected, list):
        assert isinstance(found, list)
        for each, other in zip(found, expected, strict=True):
            assert_same(each, other, **tolerance)
    elif isinstance(expected, torch.Tensor):
        torch.testing.assert_close(found, expected, equal_nan=True, **tolerance)
    else:
        assert found == expected


@INPLACE
@settings(max_examples=150)
@given(recipe=recipes())
def test_fuse_is_undetectable(inplace, recipe):
    x = torch.randn(6, WIDTH)
    original = build(recipe)
    before = attributes(original)
    fused = fuse(original, inplace=inplace)
    fuse_report(fused)
    assert_same(used(fused, x), used(build(recipe), x), rtol=0, atol=0)
    if not inplace:
        assert_same(state(attributes(original)), state(before), rtol=0, atol=0)


@settings(max_examples=25)
@given(recipe=recipes(depth=0))
def test_fuse_is_undetectable_on_the_kernels(recipe):
    x = torch.randn(6, WIDTH)
    expected = used(build(recipe, p=0.0), x)
    with launch.backend("triton"):
        assert_same(used(fuse(build(recipe, p=0.0)), x), expected, rtol=1e-4, atol=1e-5)


@INPLACE
@settings(max_examples=50)
@given(recipe=recipes())
def test_unfuse_goes_back(inplace, recipe):
    original = build(recipe)
    back = unfuse(fuse(original, inplace=inplace), inplace=inplace)
    other = build(recipe)
    assert [type(m) for m in back.modules()] == [type(m) for m in other.modules()]
    assert repr(back) == repr(other)
    assert_same(state(attributes(back)), state(attributes(other)), rtol=0, atol=0)
    assert [*back.state_dict()] == [*other.state_dict()]
