"""Ray: what a run asks of a cluster, its session, its actors, the job that is submitted, the doctor."""
