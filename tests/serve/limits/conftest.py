from tests.serve.services import free_port, keys_db, postgres_server, postgres_url, redis_server, redis_url

__all__ = ["free_port", "keys_db", "postgres_server", "postgres_url", "redis_server", "redis_url"]
