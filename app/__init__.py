"""Lightning: tasks, data, callbacks, strategies, evaluation."""
