"""What several merge methods are built from: weights, selections, the stages of task vectors."""
