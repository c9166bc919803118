Feature: Payments

  Scenario: A refused payment leaves no order
    Given Ann has logged in
    And a kettle
    And the payment of Ann will be refused
    When Ann puts 1 of the kettle into the basket
    And Ann orders
    Then the answer is 402
    And Ann has 0 orders
    And the audit of Ann says "logged in, payment refused"
    And there are 10 of the kettle in stock

  # The shop waits for the payment, with an order that it has not committed.
  Scenario Outline: A request that is still running
    Given a test within this one, which owns the audit rows
    And Ann has logged in
    And a kettle
    And the payment of Ann will be <answered>
    When Ann orders the kettle and does not wait
    Then a cleanup without patience gives up
    When the payment is answered
    Then the answer is <status>
    When the test within is over
    Then nothing is left of it

    Examples:
      | answered | status |
      | accepted | 201    |
      | refused  | 402    |

  # The test does not wait for its own request; the cleanup does.
  Scenario: A request that ends while the cleanup runs
    Given a test within this one, which owns the audit rows
    And Ann has logged in
    And a kettle
    When Ann orders the kettle and does not wait
    And the payment is being answered
    And the test within is over
    Then the answer is 201
    And nothing is left of it
