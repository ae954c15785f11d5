"""A preference that goes in circles has no best answer; COMAL finds the mixture that nothing beats."""

from coala.nash import PreferenceGame, solve

# a is preferred to c, c to b, and b to a.
game = PreferenceGame([[0.5, 0.1, 0.8], [0.9, 0.5, 0.1], [0.2, 0.9, 0.5]], labels=["a", "b", "c"])
print("exact, by a linear program:", game.nash().strategy.round(4))

start = [0.2, 0.5, 0.3]
for method in ("comal", "dpo"):
    result = solve(game, start, method=method, outer=200)
    print(f"{method}: policy {result.policy.round(4)}, duality gap {result.gap:.1e} after 200 updates")
