"""What has been: decisions kept for `explain`, and copies of the traffic for those who record it. Never a prompt."""
