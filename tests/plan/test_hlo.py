import jax
import jax.numpy as jnp
import pytest

from qstar_jax.plan.hlo import Array, Module


def compiled(function, *shapes) -> Module:
    return Module.parse(jax.jit(function).lower(*shapes).compile().as_text())


def floats(*shape):
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def runs_of(module: Module, opcodes: str) -> list[float]:
    return [runs for _, _, runs in module.instructions(opcodes)]


def test_sizes_of_arrays():
    for dtype, width in {"pred": 1, "s8": 1, "bf16": 2, "f32": 4, "f8e4m3fn": 1, "c128": 16}.items():
        assert Array(dtype, (3, 4)).nbytes == 12 * width
    assert Array("s4", (3,)).nbytes == 2  # two to a byte
    assert Array("f32", ()).nbytes == 4


def test_the_bodies_of_nested_loops_run_by_their_trip_counts():
    def program(x, w):
        def outer(x, _):
            return jax.lax.fori_loop(0, 3, lambda _, x: jnp.tanh(x @ w), x), None

        return jax.lax.scan(outer, x, length=5)[0]

    module = compiled(program, floats(32, 64), floats(64, 64))
    assert runs_of(module, "dot") == [15]
    assert sorted((loop.trips, loop.runs) for loop in module.loops) == [(3, 5), (5, 1)]
    assert all(loop.source.endswith("while") for loop in module.loops)


def test_a_loop_of_unknown_length_runs_as_often_as_assumed():
    def program(x, w, n):
        return jax.lax.fori_loop(0, n, lambda _, x: jnp.tanh(x @ w), x)

    module = compiled(program, floats(32, 64), floats(64, 64), jax.ShapeDtypeStruct((), jnp.int32))
    assert [loop.trips for loop in module.loops] == [None]
    assert runs_of(module, "dot") == [1]
    assert runs_of(Module(module.computations, module.entry, unknown_trips=(7,)), "dot") == [7]


def test_loops_of_unknown_length_in_their_order():
    def program(x, w, n):
        for _ in range(2):
            x = jax.lax.fori_loop(0, n, lambda _, x: jnp.tanh(x @ w), x)
        return jax.lax.fori_loop(0, n, lambda _, x: jax.lax.fori_loop(0, n, lambda _, x: jnp.tanh(x @ w), x), x)

    module = compiled(program, floats(32, 64), floats(64, 64), jax.ShapeDtypeStruct((), jnp.int32))
    assumed = Module(module.computations, module.entry, unknown_trips=(2, 3, 5, 7))
    assert sorted(runs_of(assumed, "dot")) == [2, 3, 5 * 7]
    assert sorted(runs_of(Module(module.computations, module.entry, unknown_trips=(2,)), "dot")) == [1, 1, 2]


def test_branches_are_equally_likely():
    module = compiled(
        lambda index, x: jax.lax.switch(index, [lambda x: x @ x, lambda x: x + 1, lambda x: jnp.tanh(x)], x),
        jax.ShapeDtypeStruct((), jnp.int32),
        floats(64, 64),
    )
    assert runs_of(module, "dot") == [1 / 3]


TPU_TEXT = """
HloModule jit_f

%body (arg.1: (s32[], bf16[8,128])) -> (s32[], bf16[8,128]) {
  %arg.1 = (s32[]{:T(128)}, bf16[8,128]{1,0:T(8,128)(2,1)}) parameter(0)
  ROOT %tuple.1 = (s32[]{:T(128)}, /*index=1*/bf16[8,128]{1,0:T(8,128)(2,1)S(1)}) tuple(%arg.1)
}

ENTRY %main.1 (x: bf16[8,128]) -> bf16[8,128] {
  %c = s32[]{:T(128)} constant(0), metadata={op_name="zero"}
  %x = bf16[8,128]{1,0:T(8,128)(2,1)} parameter(0)
  %t = (s32[]{:T(128)}, bf16[8,128]{1,0:T(8,128)(2,1)}) tuple(%c, %x)
  ROOT %w = (s32[]{:T(128)}, bf16[8,128]{1,0:T(8,128)(2,1)}) while(%t), condition=%body, body=%body, backend_config={"a":["(}"]}
}
"""  # noqa: E501


def test_layouts_of_tpus_and_tuples_are_read():
    module = Module.parse(TPU_TEXT)
    assert module.entry == "main.1"
    loop = module.computations["main.1"]["w"]
    assert loop.opcode == "while" and loop.operands == ("t",)
    assert loop.results == (Array("s32", ()), Array("bf16", (8, 128)))
    assert loop.config == {"a": ["(}"]}
    assert module.computations["main.1"]["c"].source == "zero"
    assert module.operands("main.1", loop) == [*loop.results]


@pytest.mark.parametrize(
    ("limit", "step", "update", "trips"),
    [
        ("limit", 1, "next", 6), ("limit", 2, "next", 3), ("limit", 4, "next", 2), ("limit", 1, "copied", 6),
        ("counter", 1, "next", None), ("limit", 1, "i", None),
    ],
)  # fmt: skip
def test_trips_are_read_off_a_counter_where_nothing_else_tells_them(limit, step, update, trips):
    text = f"""
%condition (arg.1: (f32[8], s32[])) -> pred[] {{
  %limit = s32[]{{:T(128)}} constant(6)
  %arg.1 = (f32[8]{{0:T(128)}}, s32[]{{:T(128)}}) parameter(0)
  %counter = s32[]{{:T(128)}} get-tuple-element(%arg.1), index=1
  ROOT %lt.1 = pred[]{{:T(512)}} compare(%counter, %{limit}), direction=LT
}}

%body (arg.2: (f32[8], s32[])) -> (f32[8], s32[]) {{
  %arg.2 = (f32[8]{{0:T(128)}}, s32[]{{:T(128)}}) parameter(0)
  %x = f32[8]{{0:T(128)}} get-tuple-element(%arg.2), index=0
  %i = s32[]{{:T(128)}} get-tuple-element(%arg.2), index=1
  %step = s32[]{{:T(128)}} constant({step})
  %next = s32[]{{:T(128)S(6)}} add(%i, %step)
  %copied = s32[]{{:T(128)}} copy(%next)
  ROOT %tuple.1 = (f32[8]{{0:T(128)}}, s32[]{{:T(128)}}) tuple(%x, %{update})
}}

ENTRY %main.1 (x: (f32[8], s32[])) -> (f32[8], s32[]) {{
  %x = (f32[8]{{0:T(128)}}, s32[]{{:T(128)}}) parameter(0)
  ROOT %w = (f32[8]{{0:T(128)}}, s32[]{{:T(128)}}) while(%x), condition=%condition, body=%body
}}
"""
    assert [loop.trips for loop in Module.parse(text).loops] == [trips]
