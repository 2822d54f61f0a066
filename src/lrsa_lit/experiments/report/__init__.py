"""What a study's results say, by their lines and the study's file alone; nothing here trains or evaluates."""
