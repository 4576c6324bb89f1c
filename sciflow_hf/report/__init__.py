"""Reports of a run: plan, plots, contact sheet, model card. May import `adapters`, `data` and below."""
