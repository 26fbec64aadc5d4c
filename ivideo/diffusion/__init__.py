"""The paper's formulas as functions of arrays: schedules, process, samplers, guidance, conditioning, distillation."""
