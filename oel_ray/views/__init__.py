"""What people look at: runs, knowledge, environments, the report page. Reads run folders; needs no cluster."""
