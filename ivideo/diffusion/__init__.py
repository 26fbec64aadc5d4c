"""The paper's formulas, on arrays alone: schedules, the process, samplers, guidance, conditioning, distillation."""
