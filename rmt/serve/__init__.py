"""`rmt serve`: HTTP over a `rmt.TaskBank` (extra `serve`). Nothing here is imported before the command or a test asks.

command    options, the bank, the process: signals and the graceful stop
app        routes and OpenAPI            schemas    what goes in and out
service    admission, decoding, loading of tasks    batching   one thread, one forward for rows of many tasks
images     bytes of strangers to a picture          edge       limits and counts around every request
metrics    Prometheus text                          page       the page at /
"""
