"""Rewards: functions that score drawn images, with the signature of trl. May import the rest of `metrics`."""
