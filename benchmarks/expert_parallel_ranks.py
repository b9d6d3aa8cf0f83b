# SPDX-License-Identifier: Apache-2.0
"""One rank of bench_expert_parallel: dispatch, experts and combine of a layer with the widths of DeepSeek-V3.

Steps are captured in a CUDA graph one after the other, each with its own inputs, or enqueued so ("eager"): as many as
fill a sample. Before each sample, ranks wait for each other, and run these steps once without counting, which also
aligns them on the GPU. A sample is the time of the slowest rank.
"""

from __future__ import annotations

import os
import time
import traceback
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from benchmarks import rows as results
from benchmarks.rows import OURS, Row
from benchmarks.timing import ROUNDS
from cupy_router import compiler, expert_layout, permute, unpermute
from cupy_router.ops._rows import LayoutInts
from cupy_router.ops._run import run_eagerly
from cupy_router.ops.permute import OP as PERMUTE
from cupy_router.torch import ExpertParallel

NUM_EXPERTS, TOP_K, HIDDEN, WIDTH = 256, 8, 7168, 2048
STEPS = {64: 40, 1024: 10, 8192: 2}  # the most in a sample, by tokens of a rank
SAMPLE_MICROSECONDS = 2000  # about
SAMPLES = 8  # of a round
DTYPE = torch.bfloat16

Step = Callable[[int], Any]  # step number i, on the i-th set of inputs
Given = tuple[Any, Any, Any]  # x, weights, indices


class Experts:
    """SwiGLU experts of a rank, by grouped GEMMs."""

    def __init__(self, count: int, device: Any) -> None:
        def matrices(outputs: int, inputs: int) -> Any:
            made = torch.empty(count, outputs, inputs, dtype=DTYPE, device=device)
            return made.normal_(std=inputs**-0.5).transpose(1, 2)

        self.up, self.down = matrices(2 * WIDTH, HIDDEN), matrices(HIDDEN, WIDTH)

    def __call__(self, rows: Any, ends: Any) -> Any:
        gate, up = torch.nn.functional.grouped_mm(rows, self.up, offs=ends).chunk(2, dim=1)
        inner = torch.nn.functional.silu(gate) * up
        return torch.nn.functional.grouped_mm(inner, self.down, offs=ends)


class PlainTorch:
    """The usual way in plain PyTorch: pairs sorted by expert, all_to_all, and sorted again where they arrive."""

    def __init__(self, num_ranks: int) -> None:
        self.num_ranks, self.num_local = num_ranks, NUM_EXPERTS // num_ranks

    def dispatch(self, x: Any, weights: Any, indices: Any) -> tuple[Any, Any, Any]:
        flat = indices.flatten().long()
        order = flat.argsort(stable=True)
        counts = torch.bincount(flat, minlength=NUM_EXPERTS)
        theirs = torch.empty_like(counts)
        dist.all_to_all_single(theirs, counts)
        sizes = torch.stack([counts, theirs]).view(2, self.num_ranks, -1).sum(dim=2).tolist()
        sent, received = sizes
        arrived = _all_to_all(x[order // TOP_K], sent, received)
        local = torch.arange(self.num_local, device=x.device).repeat(self.num_ranks)
        again = local.repeat_interleave(theirs, output_size=len(arrived)).argsort(stable=True)
        ends = theirs.view(self.num_ranks, -1).sum(dim=0).cumsum(0).int()
        return arrived[again], ends, (order, again, sent, received, weights)

    def combine(self, y: Any, ticket: Any) -> Any:
        order, again, sent, received, weights = ticket
        back = torch.empty_like(y)
        back[again] = y
        pairs = _all_to_all(back, received, sent)
        slots = torch.empty_like(pairs)
        slots[order] = pairs
        return (slots.view(*weights.shape, -1) * weights[:, :, None]).sum(dim=1).to(y.dtype)


def _all_to_all(rows: Any, sent: list[int], received: list[int]) -> Any:
    found = rows.new_empty((sum(received), rows.shape[1]))
    dist.all_to_all_single(found, rows, received, sent)
    return found


class Problem:
    """One number of tokens of each rank, with as many sets of inputs as there are steps."""

    def __init__(self, n: int, device: Any, report: Callable[[Row], None]) -> None:
        """Prepare inputs. report: called with each row when it is measured."""
        self.n, self.device, self.num_ranks, self.steps = n, device, dist.get_world_size(), STEPS[n]
        self.report = report
        self.cell: Row = {"op": "expert_parallel", "E": NUM_EXPERTS, "k": TOP_K, "H": HIDDEN, "n": n}
        self.cell |= {"ranks": self.num_ranks, "dtype": "bfloat16"}
        draw = torch.Generator(device=device).manual_seed(n + dist.get_rank())
        self.given = [self._inputs(draw) for _ in range(self.steps)]
        # Pairs of this rank's experts, which differ a little between sets of inputs and ranks.
        first, count = ExpertParallel(None, NUM_EXPERTS).experts
        ids = torch.stack([indices for *_, indices in self.given]).contiguous()
        every = ids.new_empty((self.num_ranks, *ids.shape))
        dist.all_gather_into_tensor(every.flatten(0, 1), ids)
        self.num_pairs = int(((every >= first) & (every < first + count)).sum()) // self.steps
        self.gather = ExpertParallel(None, NUM_EXPERTS, max_tokens=n)
        self.others = {
            f"{OURS}, exchange": ExpertParallel(None, NUM_EXPERTS, method="exchange"),
            "PyTorch, all_to_all": PlainTorch(self.num_ranks),
        }

    def _inputs(self, draw: torch.Generator) -> Given:
        def normal(*shape: int) -> Any:
            return torch.randn(shape, generator=draw, device=self.device)

        chosen = normal(self.n, NUM_EXPERTS).topk(TOP_K)
        return normal(self.n, HIDDEN).to(DTYPE), chosen.values.softmax(dim=1), chosen.indices.int()

    def measure(self, step: Step, by: str, part: str, *, graph: bool) -> None:
        """Report the time of a step."""
        median, spread = results.median_and_spread(samples(step, self.steps, graph=graph))
        cell = self.cell | {"by": by, "call": "CUDA graph" if graph else "eager", "part": part}
        self.report({"what": "gpu"} | cell | {"us": round(median, 2), "spread_us": round(spread, 2)})

    # -- Steps ---------------------------------------------------------------------------------------------------------

    def parts(self, engine: Any, experts: Experts, by: str, *, graph: bool) -> None:
        """Measure each part of the layer, and several together."""
        rows, layout, ticket = engine.dispatch(*self.given[0])

        def dispatch(i: int) -> Any:
            return engine.dispatch(*self.given[i % self.steps])

        def combine(i: int) -> Any:
            return engine.combine(rows, ticket)

        def both(i: int) -> Any:
            found, _, new = dispatch(i)
            return engine.combine(found, new)

        def layer(i: int) -> Any:
            found, new_layout, new = dispatch(i)
            return engine.combine(experts(found, _ends(new_layout)), new)

        steps = {"dispatch + combine": both, "dispatch": dispatch, "combine": combine, "layer": layer}
        if graph:
            steps["experts"] = lambda i: experts(rows, _ends(layout))
        for part, step in steps.items():
            self.measure(step, by, part, graph=graph)

    def collectives(self) -> None:
        """Measure one all_gather and one reduce_scatter with the bytes of "gather"; and more like them.

        The first two are what the bar counts.
        """
        row_bytes, more = HIDDEN * DTYPE.itemsize, 2 * 4 * TOP_K
        sums = torch.randn(self.num_ranks * self.n, HIDDEN, device=self.device).to(DTYPE)
        target = sums.new_empty((self.n, HIDDEN))
        ids = torch.zeros(self.n, more, dtype=torch.uint8, device=self.device)
        sources = [torch.randint(0, 99, (self.n, row_bytes + more), device=self.device, dtype=torch.uint8)]
        into = sources[0].new_empty((self.num_ranks * self.n, row_bytes + more))
        ids_into = ids.new_empty((self.num_ranks * self.n, more))
        tokens_into = sums.new_empty((self.num_ranks * self.n, HIDDEN))
        sends = sums.new_empty((self.num_ranks * self.n, HIDDEN))
        x = self.given[0][0]
        steps = {
            "all_gather": lambda i: dist.all_gather_into_tensor(into, sources[0]),
            "reduce_scatter": lambda i: dist.reduce_scatter_tensor(target, sums),
            "all_gather of tokens alone": lambda i: dist.all_gather_into_tensor(tokens_into, x),
            "all_gather of experts and weights alone": lambda i: dist.all_gather_into_tensor(ids_into, ids),
            "all_to_all of tokens": lambda i: dist.all_to_all_single(sends, sums),
        }
        for part, step in steps.items():
            self.measure(step, "NCCL", part, graph=True)

    def copies(self) -> None:
        """Measure copies of the bytes that permute and unpermute move, half read and half written."""
        num_rows = self.num_ranks * self.n + self.num_pairs
        source = torch.randint(0, 99, (num_rows * HIDDEN * DTYPE.itemsize // 2,), device=self.device, dtype=torch.uint8)
        target = torch.empty_like(source)
        for part in ("permute", "unpermute"):
            self.measure(lambda i: target.copy_(source), "copy", part, graph=True)

    def kernels(self) -> None:
        """Measure our ops alone, on the tokens of all ranks."""
        every = [[torch.cat([array] * self.num_ranks) for array in given] for given in self.given[: self.steps]]
        experts = ExpertParallel(None, NUM_EXPERTS).experts
        layouts = [expert_layout(indices, NUM_EXPERTS, experts=experts) for *_, indices in every]
        rows = permute(every[0][0], layouts[0])

        def gathered(i: int) -> Given:
            return tuple(every[i % len(every)])  # type: ignore[return-value]

        def move(i: int) -> Any:
            layout = layouts[i % len(layouts)]
            return run_eagerly(
                PERMUTE, LayoutInts(clears=False), (gathered(i)[0], layout.order, layout.positions, None)
            )

        steps = {
            "expert_layout": lambda i: expert_layout(gathered(i)[2], NUM_EXPERTS, experts=experts),
            "permute": move,
            "unpermute": lambda i: unpermute(rows, layouts[i % len(layouts)], gathered(i)[1]),
        }
        for part, step in steps.items():
            self.measure(step, OURS, part, graph=True)

    def check(self, experts: Experts) -> None:
        """Compare the outputs of all engines."""
        outs = []
        for engine in (self.gather, *self.others.values()):
            rows, layout, ticket = engine.dispatch(*self.given[0])
            outs.append(engine.combine(experts(rows, _ends(layout)), ticket).float())
        for out in outs[1:]:
            if not (out - outs[0]).abs().max() <= 0.02 * outs[0].abs().max():
                raise ValueError(f"outputs differ by {(out - outs[0]).abs().max()} of {outs[0].abs().max()}")


def _ends(layout: Any) -> Any:
    return getattr(layout, "ends", layout)


# -- Time --------------------------------------------------------------------------------------------------------------


def samples(step: Step, most: int, *, graph: bool) -> list[list[float]]:
    """Return the microseconds of a step in each sample of each round, of the slowest rank. most: steps of a sample."""
    runs = captured if graph else partial(partial, _run)
    probe = runs(step, 2)
    probe()
    slowest = _slowest([_sample(probe) for _ in range(2)])
    steps = max(2, min(most, int(2 * SAMPLE_MICROSECONDS / min(slowest))))
    rounds = []
    for _ in range(ROUNDS):
        run = runs(step, steps)
        run()
        rounds.append([_sample(run) / steps for _ in range(SAMPLES)])
    return _slowest(rounds)


def _sample(run: Callable[[], None]) -> float:
    """Return the microseconds of a run on the GPU that follows another one."""
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    dist.barrier()
    run()
    begin.record()
    run()
    end.record()
    end.synchronize()
    return float(begin.elapsed_time(end) * 1000)


def _slowest(times: list[Any]) -> list[Any]:
    """Return the largest numbers of all ranks."""
    found = torch.tensor(times, device="cuda")
    dist.all_reduce(found, dist.ReduceOp.MAX)
    return found.tolist()  # type: ignore[no-any-return]


def captured(step: Step, steps: int) -> Callable[[], None]:
    """Return a function that replays the steps."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            step(0)  # compiles and allocates
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        _run(step, steps)
    return graph.replay  # type: ignore[no-any-return]


def _run(step: Step, steps: int) -> None:
    for i in range(steps):
        step(i)


# -- Ranks -------------------------------------------------------------------------------------------------------------


def measure(problems: Sequence[Problem], experts: Experts) -> None:
    """Report the rows of all problems, first those of "gather" and of its bar."""
    by = f"{OURS}, gather"
    for problem in problems:
        problem.collectives()
        problem.copies()
        problem.parts(problem.gather, experts, by, graph=True)
        torch.cuda.empty_cache()
    for problem in problems:
        problem.check(experts)
        problem.kernels()
        for name, engine in {by: problem.gather, **problem.others}.items():
            problem.parts(engine, experts, name, graph=False)
        torch.cuda.empty_cache()


def run(rank: int, num_ranks: int, folder: str, sizes: tuple[int, ...]) -> None:
    """Measure with the other ranks. Rank 0 prints each row, and writes all so far to a file in the folder."""
    begin, found = time.perf_counter(), []

    def report(row: Row) -> None:
        found.append(row)
        if rank == 0:
            print(f"{time.perf_counter() - begin:5.1f} s: {results.label(row)} us={row['us']}", flush=True)
            unfinished = Path(folder) / "unfinished.json"
            results.save(unfinished, {}, found)
            unfinished.rename(Path(folder) / "rows.json")

    try:
        torch.cuda.set_device(rank)
        device = torch.device("cuda", rank)
        store = dist.FileStore(f"{folder}/store", num_ranks)
        dist.init_process_group("nccl", store=store, rank=rank, world_size=num_ranks, device_id=device)
        compiler.WATCHING = False
        with torch.no_grad():
            experts = Experts(ExpertParallel(None, NUM_EXPERTS).experts[1], device)
            measure([Problem(n, device, report) for n in sizes], experts)
        dist.destroy_process_group()
    except BaseException:
        traceback.print_exc()
        os._exit(1)  # an orderly end might wait for the other ranks
