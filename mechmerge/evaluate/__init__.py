"""Evaluation: suites of prompts, generated and judged answers, statistics, tables and the gate."""
