"""What every other folder uses: argument checks, processes, logging, progress, files, seeds."""
