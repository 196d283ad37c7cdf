"""Metrics: functions of predictions and truth, without a model or a task."""
