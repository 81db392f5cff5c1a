from nanostudy.cli import main

main()
