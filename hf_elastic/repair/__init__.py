"""Makes a smaller model good again: in closed form (refit), or by a short distillation (recover)."""
