"""What a run tells people: plan, plots, contact sheet, model card. May import `adapters`, `data` and below."""
