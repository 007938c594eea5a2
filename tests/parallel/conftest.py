import pytest

from tests.parallel.pool import Pool


@pytest.fixture(scope="session")
def pool():
    """Workers for distributed jobs, shared by all tests: `pool.run(function, *arguments, world_size=4)`."""
    workers = Pool()
    yield workers
    workers.close()


@pytest.fixture(scope="session")
def expendable_pool():
    """The same for jobs that fail: the workers of `pool`, which have imported what training needs, outlive them."""
    workers = Pool()
    yield workers
    workers.close()
