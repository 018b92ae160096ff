"""Surgery: requests become axis maps, axis maps a plan, the plan files. numpy only, no torch."""
