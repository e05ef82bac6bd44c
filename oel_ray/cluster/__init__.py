"""Work with Ray: the demand of a run, its session, its actors, submitted jobs, the doctor."""
