"""``python -m benchmarks``: every section of BENCHMARKS.md, one after the other."""

from benchmarks import apply, busy, merge, rewards, stacks

apply.main()
print()
stacks.main()
print()
merge.main()
print()
busy.main()
print()
rewards.main()
