"""Reports of a study's results, made only from the results and the study file; nothing is trained or evaluated."""
