"""What a checkpoint holds, how it is written and read, and how a run resumes from it."""
