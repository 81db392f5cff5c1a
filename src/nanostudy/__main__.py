from nanostudy.cli.main import main

main()
