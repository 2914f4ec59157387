# SPDX-License-Identifier: Apache-2.0
"""torch_mole.py [--json FILE]: how long forward and backward of a mixture of LoRA experts over a
frozen linear map take in PyTorch, beside that map, and those of a mixture of SwiGLU networks, for the
sizes of bench/cuda/device_bench.cu.

loop         per expert: where, gather, two products, index_add_ (as public MoLE code does)
dense        all experts' ranks at once, masked by the gates
compiled     the same through torch.compile
grouped_mm   tokens sorted by expert, torch._grouped_mm over the segments, index_add_
"""

import argparse
import json
import statistics

import torch
import torch.nn.functional as F

EXPERTS, CHOSEN, RANK = 8, 2, 16


class Mole(torch.nn.Module):
    def __init__(self, width):
        super().__init__()
        options = dict(device="cuda", dtype=torch.bfloat16)
        self.base = torch.randn(width, width, **options) * width**-0.5
        self.router = torch.nn.Parameter(torch.randn(EXPERTS, width, **options) * width**-0.5)
        self.a = torch.nn.Parameter(torch.randn(EXPERTS, RANK, width, **options) * width**-0.5)
        self.b = torch.nn.Parameter(torch.randn(EXPERTS, width, RANK, **options) * 0.02)

    def route(self, x):
        p = torch.softmax((x @ self.router.t()).float(), dim=-1)
        top, chosen = p.topk(CHOSEN, dim=-1)
        return (top / top.sum(-1, keepdim=True)).to(x.dtype), chosen

    def loop(self, x):
        gates, chosen = self.route(x)
        y = x @ self.base.t()
        for e in range(EXPERTS):
            token, place = torch.where(chosen == e)
            if token.numel() == 0:
                continue
            out = (x[token] @ self.a[e].t()) @ self.b[e].t()
            y.index_add_(0, token, out * gates[token, place, None])
        return y

    def dense(self, x):
        gates, chosen = self.route(x)
        weights = torch.zeros(x.shape[0], EXPERTS, device=x.device, dtype=x.dtype)
        weights = weights.scatter(1, chosen, gates)
        u = x @ self.a.reshape(EXPERTS * RANK, -1).t()
        z = (u.view(-1, EXPERTS, RANK) * weights[:, :, None]).reshape(-1, EXPERTS * RANK)
        return x @ self.base.t() + z @ self.b.permute(0, 2, 1).reshape(EXPERTS * RANK, -1)

    def grouped(self, x):
        gates, chosen = self.route(x)
        order = torch.argsort(chosen.reshape(-1), stable=True)
        counts = torch.zeros(EXPERTS, device=x.device, dtype=torch.int32).scatter_add(
            0, chosen.reshape(-1), torch.ones_like(chosen.reshape(-1), dtype=torch.int32))
        offsets = torch.cumsum(counts, 0).to(torch.int32)
        token = order // CHOSEN
        u = torch._grouped_mm(x[token], self.a.transpose(1, 2), offs=offsets)
        out = torch._grouped_mm(u, self.b.transpose(1, 2), offs=offsets)
        y = x @ self.base.t()
        return y.index_add(0, token, out * gates.reshape(-1)[order, None])


class Ffn(torch.nn.Module):
    """SwiGLU experts, as fused_moe_ffn has them."""

    def __init__(self, width, hidden, experts, chosen):
        super().__init__()
        options = dict(device="cuda", dtype=torch.bfloat16)
        self.experts, self.chosen = experts, chosen
        self.router = torch.nn.Parameter(torch.randn(experts, width, **options) * width**-0.5)
        self.gate_up = torch.nn.Parameter(
            torch.randn(experts, width, 2 * hidden, **options) * width**-0.5)
        self.down = torch.nn.Parameter(
            torch.randn(experts, hidden, width, **options) * hidden**-0.5)

    def route(self, x):
        p = torch.softmax((x @ self.router.t()).float(), dim=-1)
        top, chosen = p.topk(self.chosen, dim=-1)
        return (top / top.sum(-1, keepdim=True)).to(x.dtype), chosen

    def loop(self, x):
        gates, chosen = self.route(x)
        y = torch.zeros_like(x)
        for e in range(self.experts):
            token, place = torch.where(chosen == e)
            if token.numel() == 0:
                continue
            a, b = (x[token] @ self.gate_up[e]).chunk(2, dim=-1)
            out = (F.silu(a) * b) @ self.down[e]
            y.index_add_(0, token, out * gates[token, place, None])
        return y

    def grouped(self, x):
        gates, chosen = self.route(x)
        order = torch.argsort(chosen.reshape(-1), stable=True)
        counts = torch.zeros(self.experts, device=x.device, dtype=torch.int32).scatter_add(
            0, chosen.reshape(-1), torch.ones_like(chosen.reshape(-1), dtype=torch.int32))
        offsets = torch.cumsum(counts, 0).to(torch.int32)
        token = order // self.chosen
        a, b = torch._grouped_mm(x[token], self.gate_up, offs=offsets).chunk(2, dim=-1)
        out = torch._grouped_mm(F.silu(a) * b, self.down, offs=offsets)
        return torch.zeros_like(x).index_add(0, token, out * gates.reshape(-1)[order, None])


def microseconds(run, rounds=9):
    for _ in range(3):
        run()
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def once(times):
        start.record()
        for _ in range(times):
            run()
        stop.record()
        stop.synchronize()
        return 1e3 * start.elapsed_time(stop) / times

    times = min(200, max(3, int(2e4 / once(3))))
    return statistics.median(once(times) for _ in range(rounds))


def runs(layer, x, dy):
    """What makes of a function of x its forward alone, and its forward and backward."""

    def forward(f):
        def run():
            with torch.no_grad():
                f(x)
        return run

    def step(f):
        def run():
            f(x).backward(dy)
            x.grad = None
            layer.zero_grad(set_to_none=True)
        return run

    return forward, step


def main():
    arguments = argparse.ArgumentParser()
    arguments.add_argument("--json")
    file = arguments.parse_args().json
    torch.manual_seed(0)
    lines = []
    print(f"torch {torch.__version__}, {torch.cuda.get_device_name()}\n")
    print("| what | time, us | beside | ratio |\n| --- | ---: | --- | ---: |")

    def line(what, us, beside, base):
        print(f"| {what} | {us:.2f} | {beside} | {us / base:.3f} |", flush=True)
        lines.append(dict(name=what, us=us, beside=beside, ratio=us / base))

    for tokens, width in ((16384, 4096), (4096, 4096)):
        at = f"N:{tokens} D:{width} E:{EXPERTS} R:{RANK}"
        layer = Mole(width)
        x = torch.randn(tokens, width, device="cuda", dtype=torch.bfloat16, requires_grad=True)
        dy = torch.randn(tokens, width, device="cuda", dtype=torch.bfloat16)

        forward, step = runs(layer, x, dy)
        linear = lambda t: t @ layer.base.t()
        base, base_step = microseconds(forward(linear)), microseconds(step(linear))
        line(f"frozen linear forward {at}", base, "itself", base)
        line(f"frozen linear forward and dx {at}", base_step, "itself", base_step)
        compiled = torch.compile(layer.dense)
        for name, f in (("loop", layer.loop), ("dense", layer.dense), ("compiled", compiled),
                        ("grouped_mm", layer.grouped)):
            try:
                line(f"{name} forward {at}", microseconds(forward(f)), "frozen linear", base)
                line(f"{name} step {at}", microseconds(step(f)), "frozen linear and dx", base_step)
            except Exception as error:  # a peer that this torch cannot run
                print(f"{name} {at}: {type(error).__name__}: {str(error).splitlines()[0]}")
    for tokens, width, hidden, experts, chosen in ((16384, 2048, 2816, 8, 2),
                                                   (4096, 2048, 1024, 64, 8)):
        at = f"N:{tokens} D:{width} H:{hidden} E:{experts} k:{chosen}"
        layer = Ffn(width, hidden, experts, chosen)
        x = torch.randn(tokens, width, device="cuda", dtype=torch.bfloat16, requires_grad=True)
        dy = torch.randn(tokens, width, device="cuda", dtype=torch.bfloat16)
        forward, step = runs(layer, x, dy)
        base = base_step = frozen_step = 0.0
        for name, f in (("ffn loop", layer.loop), ("ffn grouped_mm", layer.grouped)):
            us, us_step = microseconds(forward(f)), microseconds(step(f))
            layer.gate_up.requires_grad_(False)
            layer.down.requires_grad_(False)
            us_frozen = microseconds(step(f))
            layer.requires_grad_(True)
            if base == 0.0:
                base, base_step, frozen_step = us, us_step, us_frozen
            line(f"{name} forward {at}", us, "ffn loop", base)
            line(f"{name} step, frozen experts {at}", us_frozen, "ffn loop", frozen_step)
            line(f"{name} step {at}", us_step, "ffn loop", base_step)
    if file:
        with open(file, "w") as out:
            json.dump(lines, out, indent=1)


main()
