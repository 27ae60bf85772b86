"""Tasks: one object that is training data, benchmark and reward at once. See `base.Task`."""

from nanoworks.tasks.base import TASKS, Conversation, Task, TaskOptions, build_task

__all__ = ["TASKS", "Conversation", "Task", "TaskOptions", "build_task"]
