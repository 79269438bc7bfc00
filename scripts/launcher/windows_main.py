# The program inside a Windows launcher: goes on with the plugin's own start file.
import os
import runpy
import sys

launcher = os.path.abspath(sys.argv[0])
runpy.run_path(os.path.normpath(os.path.join(os.path.dirname(launcher), r"@START@")), run_name="__main__")
