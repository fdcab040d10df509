"""What is known of each adapter on the volume: its state, what it holds, and whether it fits the model."""
