"""Launch files made from a few fields: targets, what each field may be, templates and examples."""
