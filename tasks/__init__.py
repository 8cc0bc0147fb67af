"""seqio registrations: data, not logic. Import a module to register its tasks."""
