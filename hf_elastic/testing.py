"""The promises of a supernet as contract checks, for our own families and for rows a user writes.

Each ``check_*`` takes a :class:`Case` and raises ``AssertionError`` with the promise, the architecture and the numbers
when it is broken. :func:`check_family` runs them all on a tiny random model.
"""

from __future__ import annotations

import random
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, Trainer, TrainerCallback, TrainingArguments

from hf_elastic.adapters import extract_adapter
from hf_elastic.adapters.lora_part import LoraPart
from hf_elastic.blocks import ROLES
from hf_elastic.checkpoint import extract
from hf_elastic.conversion import make_elastic
from hf_elastic.declaration import ElasticConfig
from hf_elastic.errors import ActivationError
from hf_elastic.families import Family, family_of
from hf_elastic.layers import Region, seeded, take_region
from hf_elastic.models.elastic_routed import LAYOUTS
from hf_elastic.models.elastic_routers import PERCENT, SUBLAYERS, TOKENS, Router
from hf_elastic.routing import RoutingConfig, add_routing
from hf_elastic.space import Architecture
from hf_elastic.supernet import Supernet
from hf_elastic.training import FixedSubnet, RandomSubnet, SubnetSamplingCallback

TOLERANCE = 1e-5
_ROUTED_TOLERANCE = 2e-6  # experts and heads one by one sum in another order
_MERGED_TOLERANCE = 5e-5  # W + s B A is rounded where W x + s B A x was not


@dataclass(frozen=True)
class Case:
    """A way to make a small random model, and the space to check on it.

    Attributes:
        make_model: returns a new fp32 model; equal weights at every call are not needed.
        config: the space of the model; the richer, the more is checked. ``None``: only what ``wrap`` adds is elastic,
            or the model is one of candidate blocks, whose own config says the space.
        family: the row under test, ``None`` for a built-in one.
        sampled: how many random architectures are checked beside smallest, midpoint and largest.
        tokens: length of the sequences.
        wrap: puts elastic adapters onto the model, such as ``lambda model: get_peft_model(model, config)``; freshly
            made they must change nothing.
        routing: what of the model, with its adapters, is routed; nothing is frozen for it. Freshly made, routers must
            change nothing.
        device: where everything runs, such as ``cuda``.
    """

    make_model: Callable[[], PreTrainedModel]
    config: ElasticConfig | None
    family: Family | None = None
    sampled: int = 8
    tokens: int = 9
    wrap: Callable[[PreTrainedModel], nn.Module] | None = None
    routing: RoutingConfig | None = None
    device: str = "cpu"
    _seed: int = field(default=0)

    def model(self) -> PreTrainedModel:
        """Makes a new model, the same at every call, in evaluation mode."""
        with seeded(self._seed):
            model = self.make_model().eval()
        model.to(self.device)
        return model

    def supernet(self) -> Supernet:
        """Makes a new model elastic, in evaluation mode; its adapters and routers are not as they began."""
        supernet = self.convert(self.model())
        generator = torch.Generator().manual_seed(self._seed)
        for part in supernet.adapter_parts:
            base = {id(parameter) for parameter in part.base.parameters()}
            for parameter in part.wrapper.parameters():
                if id(parameter) not in base:
                    parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator).to(self.device)
        for routed in supernet.router_parts:
            for parameter in routed.routers.parameters():
                parameter.data += 0.3 * torch.randn(parameter.shape, generator=generator).to(self.device)
                parameter.requires_grad_()
        if supernet.router_parts and supernet.causal:
            _set_thresholds(supernet, self.inputs(supernet.model, batch_size=8))
        return supernet

    def convert(self, model: PreTrainedModel) -> Supernet:
        """Makes a model elastic, with fresh adapters where the case has such."""
        if self.config is not None or (self.wrap is None and model.config.model_type in ROLES):
            make_elastic(model, self.config, family=self.family)
        with seeded(self._seed):
            whole = model if self.wrap is None else self.wrap(model).eval()
        if self.routing is None:
            return Supernet(whole)
        return add_routing(whole, self.routing, seed=self._seed, freeze=False)

    def architectures(self, supernet: Supernet) -> list[Architecture]:
        """Largest, midpoint, smallest, and random ones."""
        space, rng = supernet.space, random.Random(self._seed)
        drawn = [space.sample(rng) for _ in range(self.sampled)]
        return list(dict.fromkeys([space.largest(), space.midpoint(), space.smallest(), *drawn]))

    def inputs(self, model: PreTrainedModel, *, batch_size: int = 2) -> dict[str, Tensor]:
        """Random token ids ``(B, T)`` with the first row padded on the left by two tokens."""
        generator = torch.Generator().manual_seed(self._seed)
        ids = torch.randint(3, model.config.vocab_size, (batch_size, self.tokens), generator=generator)
        mask = torch.ones_like(ids)
        mask[0, :2] = 0
        return {"input_ids": ids.to(self.device), "attention_mask": mask.to(self.device)}


def _set_thresholds(supernet: Supernet, inputs: dict[str, Tensor]) -> None:
    """Sets what tokens of a causal model must exceed so that, on these inputs, about each capacity of them does."""
    kept = inputs["attention_mask"].bool()
    tokens = [(part, kind) for part in supernet.router_parts for kind in part.routers if kind in TOKENS]
    for part, kind in tokens:
        router: Router = part.routers[kind]
        layout = LAYOUTS[part.layer.family.model_type]
        name = layout.attention if SUBLAYERS[kind] == "attention" else layout.mlp_in
        states: list[Tensor] = []

        def note(module: nn.Module, args: Any, kwargs: Any, *, found: list[Tensor] = states) -> None:
            found.append(args[0] if args else kwargs["hidden_states"])

        hook = part.layer.layer.get_submodule(name).register_forward_pre_hook(note, with_kwargs=True)
        with torch.no_grad():
            supernet.base(**inputs)
            scores = router(states[0])[kept].flatten()
        hook.remove()
        shares = torch.tensor([1 - value / PERCENT for value in router.values], device=scores.device)
        router.thresholds.copy_(scores.quantile(shares))


def check_family(case: Case) -> None:
    """Runs every promise on a family.

    Raises:
        AssertionError: a promise is broken; the message says which, where, and by how much.
    """
    for check in PROMISES:
        check(case)


def check_largest_is_parent(case: Case) -> None:
    """Promise 1: after conversion the largest architecture gives bit-identical outputs.

    So it does, but for rounding, where everything goes through fresh routers. Of candidate blocks, moreover: each path
    gives what the static model of its own config does with its weights.
    """
    model = case.model()
    inputs = case.inputs(model)
    with torch.no_grad():
        before = model(**inputs)[0]
        supernet = case.convert(model)
        with supernet.activate(supernet.space.largest()):
            after = model(**inputs)[0]
    assert torch.equal(before, after), (
        f"promise 1: outputs moved by {_gap(before, after):.1e} when the model was converted"
    )
    if supernet.router_parts:
        with torch.no_grad(), _all_routed(supernet):
            routed = model(**inputs)[0]
        label = "promise 1: fresh routers that let everything in change the outputs"
        _close(routed, before, label, mask=inputs["attention_mask"], tolerance=_ROUTED_TOLERANCE)
    for architecture in case.architectures(supernet) if supernet.block_parts else ():
        static = static_path(supernet, architecture)
        with torch.no_grad(), supernet.activate(architecture):
            got, wanted = model(**inputs)[0], static(**inputs)[0]
        label = f"promise 1: the path {architecture!r} differs from its static model"
        _close(got, wanted, label, mask=inputs["attention_mask"])


@contextmanager
def _all_routed(supernet: Supernet) -> Iterator[None]:
    """Lets sublayers follow their routers at full capacity too, where these let everything in."""
    held = [part.routers for part in supernet.router_parts]
    for routers in held:
        routers.__dict__["routes"] = lambda *kinds, known=frozenset(routers): bool(known.intersection(kinds))
        for kind in routers if routers.causal else ():
            if kind in TOKENS:
                routers[kind].thresholds.fill_(-torch.inf)
    try:
        yield
    finally:
        for routers in held:
            del routers.__dict__["routes"]


def static_path(supernet: Supernet, architecture: Architecture) -> PreTrainedModel:
    """Makes the static model of a path of candidate blocks from a config of its own, with the weights by name.

    Nothing of :func:`hf_elastic.extract` is used: it is what that is compared with.
    """
    config, shapes = supernet.base.config, supernet.block_shapes(architecture)
    per_layer: dict[int, dict[str, Any]] = {}
    for number, shape in enumerate(shapes):
        per_layer[number] = {
            "block": shape.block,
            "intermediate_size": shape.intermediate_size,
            "num_attention_heads": shape.num_attention_heads,
            "bottleneck_head_dim" if shape.block.startswith("bottleneck") else "head_dim": shape.head_dim,
        }
    left = {"candidate_blocks", "candidate_widths", "candidate_heads", "per_layer_config"}
    fields = {name: value for name, value in config.to_dict().items() if name not in left}
    model: PreTrainedModel = type(supernet.base)(type(config)(**fields, per_layer_config=per_layer)).eval()
    with supernet.activate(architecture):
        regions = supernet.active_regions(supernet.base)
        weights = supernet.base.state_dict()
    chosen: dict[str, Tensor] = {}
    for name, tensor in weights.items():
        before, _, inside = name.partition(".candidates.")
        block, _, rest = inside.partition(".")
        if inside and block != shapes[int(before.rpartition(".")[2])].block:
            continue
        region = regions.get(name)
        chosen[f"{before}.{rest}" if inside else name] = tensor if region is None else take_region(tensor, region)
    model.load_state_dict(chosen)
    model.to(supernet.base.device)
    return model


def check_activation_is_restored(case: Case) -> None:
    """Promise 2: leaving ``activate`` restores, nested and after exceptions; a second thread is refused."""
    supernet = case.supernet()
    space = supernet.space
    small, middle, largest = space.smallest(), space.midpoint(), space.largest()
    assert supernet.active == largest, "promise 2: the largest is not active after conversion"
    with supernet.activate(small):
        with supernet.activate(middle):
            assert supernet.active == middle, "promise 2: the inner architecture is not active"
        assert supernet.active == small, "promise 2: leaving the inner block did not restore the outer one"
        try:
            with supernet.activate(middle):
                raise KeyError("inside")
        except KeyError:
            pass
        assert supernet.active == small, "promise 2: an exception left the wrong architecture active"
    assert supernet.active == largest, "promise 2: leaving the outer block did not restore the largest"
    assert _sizes(case, supernet) == supernet.expected(largest), "promise 2: the modules were not restored"
    assert _refused_in_a_thread(supernet, middle), "promise 2: a second thread could activate an architecture"


def _refused_in_a_thread(supernet: Supernet, architecture: Architecture) -> bool:
    """Whether a second thread is refused while this one has an activation open."""
    refused: list[BaseException] = []

    def other_thread() -> None:
        try:
            with supernet.activate(architecture):
                pass
        except ActivationError as error:
            refused.append(error)

    thread = threading.Thread(target=other_thread)
    with supernet.activate(supernet.space.smallest()):
        thread.start()
        thread.join()
    return bool(refused)


def check_state_dict_is_stock(case: Case) -> None:
    """Promise 3: names and shapes of the state dict are those of the stock model, but for what adapters add."""
    model = case.model()
    before = {name: t.shape for name, t in model.state_dict().items()}
    supernet = case.convert(model)
    with supernet.activate(supernet.space.smallest()), supernet.plain():
        after = {name: t.shape for name, t in model.state_dict().items()}
    assert before == after, f"promise 3: state dict changed: {set(before.items()) ^ set(after.items())}"


def check_extracted_equals_active(case: Case) -> None:
    """Promise 4: an extracted subnet equals the supernet with it active, within 1e-5 · max|output| in fp32."""
    supernet = case.supernet()
    inputs = case.inputs(supernet.model)
    for architecture in case.architectures(supernet):
        with torch.no_grad(), supernet.activate(architecture):
            wanted = supernet.model(**inputs)[0]
        static = not supernet.layer_parts or supernet.family.static_type
        form = None if static else supernet.loadability(architecture)
        for label, extracted in _extracted(supernet, architecture, form):
            with torch.no_grad():
                got = extracted(**inputs)[0]
            _close(
                got,
                wanted,
                f"promise 4: extracted model{label} differs from {architecture!r}",
                mask=inputs["attention_mask"],
                tolerance=_MERGED_TOLERANCE if label else TOLERANCE,
            )


def _extracted(supernet: Supernet, architecture: Architecture, form: Any) -> Iterator[tuple[str, nn.Module]]:
    """The extracted model; with adapters both the base with the extracted adapter on it, and the merged one."""
    if not supernet.adapter_parts:
        yield "", extract(supernet, architecture, loadability=form)
        return
    yield ", merged,", extract(supernet, architecture, loadability=form, merge=True)
    loras = [part for part in supernet.adapter_parts if isinstance(part, LoraPart)]
    if any(part.rank(architecture) for part in loras) and not any(part.in_weight for part in loras):
        base = extract(supernet, architecture, loadability=form, merge=False)
        yield "", extract_adapter(supernet, architecture).onto(base)


def check_gradients_stay_inside(case: Case) -> None:
    """Promise 5: gradients outside the active slices are exactly zero or None, and such slices do not move."""
    supernet = case.supernet()
    model = supernet.model.train()
    inputs = case.inputs(model)
    for architecture in case.architectures(supernet):
        model.zero_grad(set_to_none=True)
        with supernet.activate(architecture):
            model(**inputs)[0].square().mean().backward()
            regions = supernet.active_regions()
        gradients = {name: p.grad for name, p in model.named_parameters() if name in regions and p.grad is not None}
        for name, gradient in gradients.items():
            outside = _outside(gradient, regions[name])
            assert not outside.any(), f"promise 5: {name} has a gradient outside {regions[name]} of {architecture!r}"
    _check_decay(case)


def _outside(tensor: Tensor, region: Region) -> Tensor:
    """A copy with zeros in the boxes of a region."""
    rest = tensor.clone()
    for box in region:
        rest[box] = 0
    return rest


def _check_decay(case: Case) -> None:
    with tempfile.TemporaryDirectory() as folder:
        largest = _train(case, folder, lambda supernet: supernet.space.largest())
        stock, regions = _train(case, folder, None), case.supernet().active_regions()
        for name, tensor in stock.items():
            # AdamW also decays what even the largest does not use: neurons that a block may still grow.
            unused = _outside(tensor - largest[name], regions[name]) if regions.get(name) else tensor.new_zeros(())
            gap = _gap(tensor - largest[name], unused)
            assert gap == 0, f"promise 5: {name} differs from stock AdamW by {gap:.1e} at the largest"
        for architecture in case.architectures(case.supernet()):
            _check_decay_of(case, architecture, folder=folder)


def _check_decay_of(case: Case, architecture: Architecture, *, folder: str) -> None:
    supernet = case.supernet()
    start = {name: t.clone() for name, t in supernet.model.state_dict().items()}
    with supernet.activate(architecture):
        regions = supernet.active_regions()
    trained = _train(case, folder, lambda _: architecture)
    for name, region in regions.items():
        moved = _outside(trained[name] - start[name], region)
        assert not moved.any(), f"promise 5: {name} moved outside {region}, all that {architecture!r} ever used of it"


def _train(case: Case, folder: str, fixed: Callable[[Supernet], Architecture] | None) -> dict[str, Tensor]:
    supernet = case.supernet()
    model = supernet.model
    rows = [{name: t[0].cpu() for name, t in case.inputs(model, batch_size=1).items()} for _ in range(6)]
    args = TrainingArguments(
        folder, max_steps=3, per_device_train_batch_size=2, weight_decay=0.3, learning_rate=1e-2, report_to="none",
        disable_tqdm=True, save_strategy="no", use_cpu=case.device == "cpu", seed=0, logging_strategy="no",
    )  # fmt: skip
    callbacks: list[TrainerCallback] = []
    if fixed is not None:
        callbacks.append(SubnetSamplingCallback(supernet, FixedSubnet(fixed(supernet))))
    trainer = _SquareTrainer(model=model, args=args, train_dataset=rows, callbacks=callbacks)
    trainer.train()
    return {name: t.detach().clone() for name, t in model.state_dict().items()}


class _SquareTrainer(Trainer):
    """Trains on the mean square of the outputs, which every head has."""

    def compute_loss(self, model: nn.Module, inputs: dict[str, Tensor], *args: Any, **kwargs: Any) -> Any:
        return model(**inputs)[0].square().mean()


def check_sampling_is_pure(case: Case) -> None:
    """Promise 6: draws depend on (seed, step, micro-step, draw) only; checkpointing recomputes the same subnet."""
    supernet = case.supernet()
    space, rule = supernet.space, RandomSubnet(seed=3)
    first = [rule.draw(space, step, micro) for step in range(4) for micro in range(2)]
    again = [RandomSubnet(seed=3).draw(space, step, micro) for step in range(4) for micro in range(2)]
    assert first == again, "promise 6: a draw changed when it was repeated"
    assert space.size < 50 or len(set(first)) > 1, "promise 6: every step drew the same subnet"
    reads = [(supernet.active, supernet.space.digest, repr(supernet)) for _ in range(3)]
    assert reads.count(reads[0]) == 3, "promise 6: reading an attribute changed something"
    if supernet.base.supports_gradient_checkpointing:
        _check_checkpointing(case, supernet)


def _check_checkpointing(case: Case, supernet: Supernet) -> None:
    architecture = case.architectures(supernet)[-1]
    plain = _gradients(case, supernet, architecture)
    supernet.base.gradient_checkpointing_enable()
    if supernet.adapter_parts:  # the base is frozen, so that nothing before the first adapter has a gradient
        supernet.base.enable_input_require_grads()
    recomputed = _gradients(case, supernet, architecture)
    supernet.base.gradient_checkpointing_disable()
    assert plain.keys() == recomputed.keys(), "promise 6: gradient checkpointing trained other parameters"
    for name, gradient in plain.items():
        gap, limit = _gap(gradient, recomputed[name]), TOLERANCE * float(gradient.abs().max())
        assert gap <= limit, f"promise 6: gradient checkpointing changed the gradient of {name} by {gap:.1e}"


def _gradients(case: Case, supernet: Supernet, architecture: Architecture) -> dict[str, Tensor]:
    model = supernet.model.train()
    model.zero_grad(set_to_none=True)
    with seeded(1), supernet.activate(architecture):  # the same dropout at every call
        model(**case.inputs(model))[0].square().mean().backward()
    model.eval()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def check_cache_is_exact(case: Case) -> None:
    """Promise 7: step-by-step outputs with a cache equal those without, for every architecture and left padding."""
    supernet = case.supernet()
    causal = supernet.causal if supernet.block_parts else family_of(supernet.base, case.family).causal
    if not causal:
        return
    inputs = case.inputs(supernet.model)
    for architecture in case.architectures(supernet):
        with supernet.activate(architecture), torch.no_grad():
            _check_steps(supernet.base, inputs, f"promise 7: {architecture!r}")


def _check_steps(model: PreTrainedModel, inputs: dict[str, Tensor], label: str) -> None:
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    positions = (mask.cumsum(-1) - 1).clamp(min=0)  # (B, T)
    base = model.base_model
    whole = base(input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=False)[0]
    half = ids.shape[1] // 2
    output = base(
        input_ids=ids[:, :half],
        attention_mask=mask[:, :half],
        position_ids=positions[:, :half],
        use_cache=True,
    )
    pieces, cache = [output[0]], output.past_key_values
    for step in range(half, ids.shape[1]):  # each a further call on the returned cache
        now = slice(step, step + 1)
        assert cache.get_seq_length() == step, (
            f"{label}: the cache says {cache.get_seq_length()} tokens, {step} were seen"
        )
        output = base(
            input_ids=ids[:, now], attention_mask=mask[:, : step + 1], position_ids=positions[:, now],
            past_key_values=cache, use_cache=True,
        )  # fmt: skip
        pieces, cache = [*pieces, output[0]], output.past_key_values
    _close(torch.cat(pieces, dim=1), whole, label, mask=mask)


def check_active_is_measurable(case: Case) -> None:
    """Promise 8: what is active can be asked, and the shapes of real tensors agree with it."""
    supernet = case.supernet()
    for architecture in case.architectures(supernet):
        with supernet.activate(architecture):
            assert supernet.active == architecture, "promise 8: `active` does not say what was activated"
            seen, wanted = _sizes(case, supernet), supernet.expected(architecture)
        wrong = {name: (seen.get(name), size) for name, size in wanted.items() if seen.get(name) != size}
        assert not wrong, f"promise 8: measured sizes differ from {architecture!r} (measured, expected): {wrong}"


def _sizes(case: Case, supernet: Supernet) -> dict[str, int]:
    return supernet.measured(**case.inputs(supernet.model))


PROMISES: Sequence[Callable[[Case], None]] = (
    check_largest_is_parent,
    check_activation_is_restored,
    check_state_dict_is_stock,
    check_extracted_equals_active,
    check_gradients_stay_inside,
    check_sampling_is_pure,
    check_cache_is_exact,
    check_active_is_measurable,
)


def _gap(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max())


def _close(got: Tensor, wanted: Tensor, label: str, *, mask: Tensor, tolerance: float = TOLERANCE) -> None:
    if got.ndim == 3 and got.shape[:2] == mask.shape:  # outputs at padding are arbitrary
        got, wanted = got[mask.bool()], wanted[mask.bool()]
    limit = tolerance * float(wanted.abs().max())
    assert _gap(got, wanted) <= limit, f"{label}: difference {_gap(got, wanted):.1e}, allowed {limit:.1e}"
