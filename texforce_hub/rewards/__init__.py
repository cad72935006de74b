"""Rewards: functions ``f(images, prompts) -> (b,)``; more is better."""
