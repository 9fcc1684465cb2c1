"""Evaluation of converted models by EleutherAI's lm-evaluation-harness, on its tasks and on local files."""
