"""Whatever modules do and return, a monitor counts it once and breaks nothing."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence
from torch.optim.optimizer import _global_optimizer_post_hooks
from torch.utils.checkpoint import checkpoint

from fastremedy import clip
from fastremedy.nn import BatchNormReLU1d
from fastremedy.stats import Monitor

from .activation_stats_reference import spare_interpreted
from .monitor_reference import (
    check_part,
    check_statistics,
    counts_of,
    grads_of,
    make_input,
    make_model,
    outputs_of,
    state_of,
    step_of,
    together,
    train,
    weights_of,
)

BOTH_FORMS = pytest.mark.parametrize("per_channel", [False, True], ids=["whole", "units"])


class Returns(nn.Module):
    """Return what a function makes of the input."""

    def __init__(self, function: Callable[[Any], Any]) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))
        self.function = function

    def forward(self, input: Any) -> Any:
        return self.function(input)


# --- calls ---


def test_module_called_twice(backend: str, device: torch.device) -> None:
    layer = nn.Linear(6, 6).to(device)
    with outputs_of(layer) as seen, Monitor(layer, per_channel=True) as monitor:
        layer(layer(make_input(device=device)))
        monitor.step()
        check_part(monitor.report().parts["activations"], [dict(seen)])


def test_shared_modules_and_parameters() -> None:
    layer = nn.Linear(6, 6)
    tied = nn.Linear(6, 6, bias=False)
    tied.weight = layer.weight
    model = nn.Sequential(layer, nn.ReLU(), layer, tied)
    with Monitor(model) as monitor:
        model(make_input()).sum().backward()
        gradients, weights = grads_of(model), weights_of(model)
        monitor.step()
    assert counts_of(monitor) == {"0": [60], "1": [30], "3": [30]}
    report = monitor.report()
    assert report.parts["weights"].names == ["0.weight", "0.bias"]
    check_part(report.parts["gradients"], [gradients])
    check_part(report.parts["weights"], [weights])


@pytest.mark.parametrize("reentrant", [True, False])
def test_recomputation_is_counted_once(backend: str, device: torch.device, reentrant: bool) -> None:
    spare_interpreted(backend, reentrant)
    model = make_model().to(device)
    with Monitor(model, per_channel=True) as monitor:
        input = make_input(device=device).requires_grad_()
        hidden = model[:2](input)
        hidden = checkpoint(model[2:4], hidden, use_reentrant=reentrant)
        model[4:](hidden).sum().backward()
        monitor.step()
    assert counts_of(monitor) == {
        "0": [80], "1": [80], "2": [40], "3": [40], "4": [20], "5": [20]
    }  # fmt: skip
    assert monitor.report().parts["gradients"].by_step["count"].gt(0).all()


def test_replicas_in_threads(backend: str, device: torch.device) -> None:
    """As in DataParallel: replicas share the hooks of the module that they were made of."""
    spare_interpreted(backend, True)
    model = make_model().to(device)
    replicas = []
    for _ in range(4):
        replica = model._replicate_for_data_parallel()
        replica._modules = {}
        for name, child in model.named_children():
            replica._modules[name] = copy = child._replicate_for_data_parallel()
            for key, param in child._parameters.items():
                assert param is not None
                setattr(copy, key, param.detach().clone())
        replicas.append(replica)
    inputs = [make_input(i, device=device) for i in range(4)]
    with Monitor(model) as monitor:
        for _ in range(5):
            calls = zip(replicas, inputs, strict=True)
            threads = [threading.Thread(target=r, args=(input,)) for r, input in calls]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
        monitor.step()
    with outputs_of(model) as seen:
        for input in inputs * 5:
            model(input)
    check_part(monitor.report().parts["activations"], [seen])


def test_evaluation_counts_nothing(backend: str, device: torch.device) -> None:
    spare_interpreted(backend, True)
    model = make_model().to(device)
    with Monitor(model, per_channel=True) as monitor:
        for training in (True, False, True):
            model.train(training)
            model(make_input(device=device))
            monitor.step()
    assert counts_of(monitor)["0"] == [80, 0, 80]
    assert monitor.report().parts["activations"].by_step["mean"][1].isnan().all()


def test_exceptions_leave_a_monitor_that_goes_on() -> None:
    def fail(input: Tensor) -> Tensor:
        if input.abs().sum() > 1e5:
            raise ValueError("too much")
        return input

    model = nn.Sequential(nn.Linear(6, 4), Returns(fail))
    hooks = model[0]._forward_hooks
    monitor = Monitor(model)

    def fail_in_training() -> None:
        with monitor:
            assert hooks
            with pytest.raises(ValueError, match="too much"):
                model(make_input() + 1e6)
            for _ in range(2):
                model(make_input())
                monitor.step()
            raise KeyError

    with pytest.raises(KeyError):
        fail_in_training()
    assert not hooks
    assert counts_of(monitor) == {"0": [40, 20], "1": [20, 20]}


# --- outputs ---


def packed(input: Tensor) -> PackedSequence:
    return pack_padded_sequence(input[None].expand(2, 5, 6), torch.tensor([5, 3]), True)


OUTPUTS: dict[str, tuple[Callable[[Tensor], Any], Callable[[Tensor], list[Tensor]]]] = {
    "tuple": (lambda x: (x, [2 * x, None], "text"), lambda x: [x, 2 * x]),
    "dict": (lambda x: {"a": x, "b": {"c": -x}, "d": 3}, lambda x: [x, -x]),
    "packed": (packed, lambda x: [packed(x).data]),
    "none": (lambda x: None, lambda x: []),
    "integers": (lambda x: (x * 10).long(), lambda x: []),
    "booleans": (lambda x: x > 0, lambda x: []),
    "complex": (lambda x: torch.complex(x, 2 * x), lambda x: [x, 2 * x]),
    "conjugate": (lambda x: torch.complex(x, 2 * x).conj(), lambda x: [x, -2 * x]),
    "negative view": (lambda x: torch.complex(x, 2 * x).conj().imag, lambda x: [-2 * x]),
    "sparse": (lambda x: x.relu().to_sparse(), lambda x: [x[x > 0]]),
    "compressed": (lambda x: x.to_sparse_csr(), None),
    "other layout": (lambda x: x.detach().cpu().to_mkldnn(), None),
    "empty": (lambda x: x[:0], lambda x: []),
    "no channels": (lambda x: x[:, :0], lambda x: []),
    "scalar": (lambda x: x.sum(), lambda x: [x.sum()]),
    "vector": (lambda x: x[0], lambda x: [x[0]]),
    "strided": (lambda x: x.t()[::2], lambda x: [x.t()[::2]]),
    "expanded": (lambda x: x[0, 0].expand(3, 4), lambda x: [x[0, 0].expand(3, 4)]),
    "parameter": (lambda x: nn.Parameter(x), lambda x: [x]),
    "other dtypes": (lambda x: (x.double(), x.bfloat16()), lambda x: [x, x.bfloat16()]),
    "nested": (lambda x: torch.nested.nested_tensor([x[0], x[1, :3]], layout=torch.jagged), None),
    "nested, strided": (lambda x: torch.nested.nested_tensor([x[0].detach()]), None),
    "quantized": (lambda x: torch.quantize_per_tensor(x.detach(), 0.1, 0, torch.qint8), None),
    "meta": (lambda x: x.to("meta"), lambda x: []),
}


@BOTH_FORMS
@pytest.mark.parametrize("kind", OUTPUTS)
@pytest.mark.filterwarnings("ignore")  # torch's own, of prototypes
def test_outputs(backend: str, device: torch.device, kind: str, per_channel: bool) -> None:
    spare_interpreted(backend, per_channel)
    function, tensors = OUTPUTS[kind]
    model = Returns(function).to(device)
    input = make_input(device=device)
    with Monitor(model, per_channel=per_channel) as monitor:
        for _ in range(2):
            expected_output = model(input)
            monitor.step()
    assert type(expected_output) is type(function(input))
    if tensors is None:
        return
    values = together([t.detach().cpu().double() for t in tensors(input)])
    columns = step_of(monitor.report().parts["activations"], 1, "")
    check_statistics(columns, values, 1e-5 if kind in ("other dtypes", "scalar") else 1e-6)


def test_modules_of_torch_with_many_outputs() -> None:
    model = nn.ModuleDict(
        {
            "lstm": nn.LSTM(6, 5, batch_first=True),
            "attention": nn.MultiheadAttention(6, 2, batch_first=True),
            "embedding": nn.Embedding(10, 6, sparse=True),
        }
    )
    with Monitor(model, per_channel=True) as monitor:
        x = model["embedding"](torch.tensor([[1, 2, 2], [4, 5, 6]]))
        output, (hidden, cell) = model["lstm"](x)
        attended, weights = model["attention"](x, x, x)
        (output.sum() + attended.sum()).backward()
        monitor.step()
    part = monitor.report().parts["activations"]
    for name, tensors in {
        "lstm": [output, hidden, cell],
        "attention": [attended, weights],
        "embedding": [x],
    }.items():
        check_statistics(step_of(part, 0, name), together(tensors))
    gradients = monitor.report().parts["gradients"]
    grad = model["embedding"].weight.grad
    assert grad is not None
    assert grad.is_sparse
    check_statistics(
        step_of(gradients, 0, "embedding.weight"), together([grad.coalesce()._values()])
    )


# --- other people's transforms and tracers ---


@BOTH_FORMS
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's own, of its decompositions
def test_transforms_of_functions(backend: str, device: torch.device, per_channel: bool) -> None:
    model = make_model().to(device)
    params = dict(model.named_parameters())
    input = make_input(device=device)

    def loss(params: dict[str, Tensor], input: Tensor) -> Tensor:
        return torch.func.functional_call(model, params, (input,)).square().sum()

    expected = torch.func.grad(loss)(params, input)
    each = torch.func.vmap(model)(input)
    with Monitor(model, per_channel=per_channel) as monitor:
        actual = torch.func.grad(loss)(params, input)
        torch.testing.assert_close(actual, expected)
        torch.testing.assert_close(torch.func.vmap(model)(input), each)
        per_sample = torch.func.vmap(torch.func.grad(loss), (None, 0))(params, input)
        torch.func.jvp(lambda x: loss(params, x), (input,), (input,))
        monitor.step()
        torch.testing.assert_close(per_sample["0.weight"].sum(0), expected["0.weight"])
        model(input)
        monitor.step()
    assert counts_of(monitor)["0"][1] == 80


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_forward_mode(backend: str, device: torch.device) -> None:
    model = make_model().to(device)
    with Monitor(model) as monitor, torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(make_input(), torch.ones(5, 6)).to(device)
        tangent = torch.autograd.forward_ad.unpack_dual(model(dual)).tangent
        assert tangent is not None
        monitor.step()
    assert counts_of(monitor)["0"] == [80]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_tracing_records_nothing_of_the_monitor(backend: str, device: torch.device) -> None:
    model = make_model().to(device)
    input = make_input(device=device)
    with Monitor(model) as monitor:
        traced = torch.jit.trace(model, input)
        kinds = {node.kind() for node in traced.inlined_graph.nodes()}
        assert kinds <= {
            "prim::GetAttr", "aten::linear", "aten::tanh", "aten::sigmoid", "aten::relu"
        }  # fmt: skip
        monitor.step()
        model(input)
        monitor.step()
    assert counts_of(monitor)["0"][1] == 80
    torch.testing.assert_close(traced(input), model(input))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_scripted_modules_are_left_out_and_traced_ones_are_layers(
    backend: str, device: torch.device
) -> None:
    def block() -> nn.Module:
        return nn.Sequential(nn.Linear(6, 6), nn.ReLU()).to(device)

    input = make_input(device=device)
    scripted, traced = torch.jit.script(block()), torch.jit.trace(block(), input)
    model = nn.Sequential(scripted, traced, nn.Linear(6, 2)).to(device)
    with Monitor(model) as monitor:
        model(input).sum().backward()
        monitor.step()
    assert counts_of(monitor) == {"1": [30], "2": [10]}
    assert monitor.to_dict()["gradients"]["0.0.weight"]["count"] == 36


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_attach_that_fails_leaves_nothing_behind() -> None:
    model = nn.Sequential(nn.Linear(6, 6), BatchNormReLU1d(6), torch.jit.script(nn.Linear(6, 2)))
    before = state_of(model)
    monitor = Monitor(model, include=["0", "1", "2"])
    num_hooks = len(_global_optimizer_post_hooks)
    for _ in range(2):
        with pytest.raises(RuntimeError, match="register_forward_hook is not supported"):
            monitor.attach()
    assert len(_global_optimizer_post_hooks) == num_hooks
    assert state_of(model) == before
    assert monitor not in clip.observers
    monitor.detach()


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.filterwarnings("ignore:While compiling")  # BatchNormReLU keeps what it has measured
def test_export(strict: bool) -> None:
    model = make_model(BatchNormReLU1d(4))
    input = make_input()
    with Monitor(model) as monitor:
        program = torch.export.export(model, (input,), strict=strict)
        monitor.step()
        train(model, monitor)
    operators = {str(n.target) for n in program.graph.nodes if n.op == "call_function"}
    assert not [name for name in operators if "fastremedy" in name]
    torch.testing.assert_close(program.module()(input), model(input))
    assert counts_of(monitor)["0"] == [0, 80]
    assert counts_of(monitor)["6"] == [0, 20]


@BOTH_FORMS
def test_fake_tensors_and_symbolic_traces(per_channel: bool) -> None:
    model = make_model()
    with Monitor(model, per_channel=per_channel) as monitor:
        with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True) as mode:
            model(mode.from_tensor(make_input()))
        torch.fx.symbolic_trace(model)
        torch.fx.experimental.proxy_tensor.make_fx(model)(make_input())
        monitor.step()
        model(make_input())
        monitor.step()
    assert counts_of(monitor)["0"][1] == 80


def test_model_on_the_meta_device() -> None:
    model = make_model().to("meta")
    with Monitor(model, per_channel=True) as monitor:
        model(torch.ones(2, 6, device="meta"))
        monitor.step()
    assert counts_of(monitor)["0"] == [0]


def test_lazy_modules() -> None:
    model = nn.Sequential(nn.LazyLinear(4), nn.ReLU())
    with Monitor(model) as monitor:
        train(model, monitor, range(2), None)
    assert counts_of(monitor) == {"0": [20, 20], "1": [20, 20]}
    assert counts_of(monitor, "weights")["0.weight"] == [24, 0]
