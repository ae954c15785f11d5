"""`coala eval`: judging, and figures of published benchmarks."""

from __future__ import annotations

import typer

from coala.cli import alpaca, arena, judge, mtbench, policy, reward_benchmarks, share

app = typer.Typer(no_args_is_help=True, help="Judge replies and compute benchmark results, end to end or from files.")
app.command("judge")(judge.judge)
app.command("grade")(judge.grade)
app.command(
    "alpaca",
    epilog="Example: `coala eval alpaca annotations.jsonl.gz --calibration df_gamed.csv "
    "--difficulty instruction_difficulty.csv`",
)(alpaca.alpaca)
app.command("mtbench", epilog="Example: `coala eval mtbench gpt-4_single.jsonl --questions question.jsonl`")(
    mtbench.mtbench
)
app.command("arena", epilog="Example: `coala eval arena judgements.jsonl --model MODEL --baseline gpt-4-0314`")(
    arena.arena
)
app.command("rewardbench", epilog="Example: `coala eval rewardbench scores.jsonl`")(reward_benchmarks.rewardbench)
app.command("rewardbench2", epilog="Example: `coala eval rewardbench2 --replies test.jsonl --run runs/demo`")(
    reward_benchmarks.rewardbench2
)
app.command("rmbench", epilog="Example: `coala eval rmbench --replies rm_bench --run runs/demo`")(
    reward_benchmarks.rmbench
)
app.command("judgebench", epilog="Example: `coala eval judgebench scores.jsonl.gz --replies gpt-4o.jsonl.gz`")(
    reward_benchmarks.judgebench
)
app.command("policy", epilog="Example: `coala eval policy runs/demo --mode shift --limit 200`")(policy.policy)
app.command(
    "share", epilog="Example: `coala eval share runs/demo --model me/film-guided --organisation me --out shared`"
)(share.share)
