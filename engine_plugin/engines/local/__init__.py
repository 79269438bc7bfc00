"""What engines that run on this machine share: install, start and stop, one server process, the models in memory."""
